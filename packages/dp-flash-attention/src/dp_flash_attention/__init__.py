"""Differentially private transformers: the public names.

Two settings that are never mixed: *release*, where an attention output leaves and is noised
(``dp_flash_attn_func``, ``DPFlashAttention``), and *training*, where attention is exact and the gradients are noised
(``make_private``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_flash_attention.cuda import cuda_version
    from dp_flash_attention.self_test import privacy_check
    from dpfa_attention import (
        DPCheckpointedAttention,
        DPFlashAttention,
        EnhancedDPFlashAttention,
        PrivacyMechanismType,
        PrivacySpent,
        PrivacyStats,
        PrivateMemory,
        RandomizedLabels,
        ReleasedAttention,
        ReleasedFeatures,
        ReleasePaths,
        check_release_paths,
        create_enhanced_dp_flash_attention,
        create_research_mechanism,
        dp_flash_attn_func,
        dp_flash_attn_qkvpacked_func,
        dp_flash_attn_varlen_func,
        dp_flash_attn_with_kvcache,
        dp_scaled_dot_product_attention,
        randomize_labels,
        register_dp_attention,
        release_attention,
        release_features,
    )
    from dpfa_core.ledger import Ledger
    from dpfa_training import clipped_gradients, engine_of, make_private, make_private_with_epsilon

__version__ = "0.1.0"

_WHERE = {
    "DPCheckpointedAttention": "dpfa_attention",
    "DPFlashAttention": "dpfa_attention",
    "EnhancedDPFlashAttention": "dpfa_attention",
    "Ledger": "dpfa_core.ledger",
    "PrivacyMechanismType": "dpfa_attention",
    "PrivacySpent": "dpfa_attention",
    "PrivacyStats": "dpfa_attention",
    "PrivateMemory": "dpfa_attention",
    "RandomizedLabels": "dpfa_attention",
    "ReleasePaths": "dpfa_attention",
    "ReleasedAttention": "dpfa_attention",
    "ReleasedFeatures": "dpfa_attention",
    "check_release_paths": "dpfa_attention",
    "clipped_gradients": "dpfa_training",
    "create_enhanced_dp_flash_attention": "dpfa_attention",
    "create_research_mechanism": "dpfa_attention",
    "cuda_version": "dp_flash_attention.cuda",
    "dp_flash_attn_func": "dpfa_attention",
    "dp_flash_attn_qkvpacked_func": "dpfa_attention",
    "dp_flash_attn_varlen_func": "dpfa_attention",
    "dp_flash_attn_with_kvcache": "dpfa_attention",
    "dp_scaled_dot_product_attention": "dpfa_attention",
    "engine_of": "dpfa_training",
    "make_private": "dpfa_training",
    "make_private_with_epsilon": "dpfa_training",
    "privacy_check": "dp_flash_attention.self_test",
    "randomize_labels": "dpfa_attention",
    "register_dp_attention": "dpfa_attention",
    "release_attention": "dpfa_attention",
    "release_features": "dpfa_attention",
}

__all__ = [
    "DPCheckpointedAttention",
    "DPFlashAttention",
    "EnhancedDPFlashAttention",
    "Ledger",
    "PrivacyMechanismType",
    "PrivacySpent",
    "PrivacyStats",
    "PrivateMemory",
    "RandomizedLabels",
    "ReleasePaths",
    "ReleasedAttention",
    "ReleasedFeatures",
    "check_release_paths",
    "clipped_gradients",
    "create_enhanced_dp_flash_attention",
    "create_research_mechanism",
    "cuda_version",
    "dp_flash_attn_func",
    "dp_flash_attn_qkvpacked_func",
    "dp_flash_attn_varlen_func",
    "dp_flash_attn_with_kvcache",
    "dp_scaled_dot_product_attention",
    "engine_of",
    "make_private",
    "make_private_with_epsilon",
    "privacy_check",
    "randomize_labels",
    "register_dp_attention",
    "release_attention",
    "release_features",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line and a planning script need neither torch nor the kernels.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_WHERE[name])
    value = getattr(module, name)
    globals()[name] = value
    return value
