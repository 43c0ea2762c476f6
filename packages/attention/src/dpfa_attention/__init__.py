"""Private attention releases: clip, calibrated noise, and a ledger line before any value leaves."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfa_attention.checkpointed_module import DPCheckpointedAttention
    from dpfa_attention.default_ledger import process_ledger
    from dpfa_attention.enhanced_module import EnhancedDPFlashAttention, create_enhanced_dp_flash_attention
    from dpfa_attention.functional import dp_flash_attn_func
    from dpfa_attention.kv_cache import dp_flash_attn_with_kvcache
    from dpfa_attention.mechanism_types import PrivacyMechanismType, create_research_mechanism
    from dpfa_attention.module import DPFlashAttention
    from dpfa_attention.privacy_spent import PrivacySpent
    from dpfa_attention.private_memory import PrivateMemory
    from dpfa_attention.qkv_packed import dp_flash_attn_qkvpacked_func
    from dpfa_attention.randomized_labels import RandomizedLabels, randomize_labels
    from dpfa_attention.release_paths import LeakingPath, ReleasePaths, check_release_paths
    from dpfa_attention.released_features import ReleasedFeatures, release_features
    from dpfa_attention.sdpa_layout import dp_scaled_dot_product_attention
    from dpfa_attention.stats import PrivacyStats
    from dpfa_attention.transformers_attention import register_dp_attention
    from dpfa_attention.transformers_models import ReleasedAttention, release_attention
    from dpfa_attention.varlen import dp_flash_attn_varlen_func

__version__ = "0.1.0"
__all__ = [
    "DPCheckpointedAttention",
    "DPFlashAttention",
    "EnhancedDPFlashAttention",
    "LeakingPath",
    "PrivacyMechanismType",
    "PrivacySpent",
    "PrivacyStats",
    "PrivateMemory",
    "RandomizedLabels",
    "ReleasePaths",
    "ReleasedAttention",
    "ReleasedFeatures",
    "check_release_paths",
    "create_enhanced_dp_flash_attention",
    "create_research_mechanism",
    "dp_flash_attn_func",
    "dp_flash_attn_qkvpacked_func",
    "dp_flash_attn_varlen_func",
    "dp_flash_attn_with_kvcache",
    "dp_scaled_dot_product_attention",
    "process_ledger",
    "randomize_labels",
    "register_dp_attention",
    "release_attention",
    "release_features",
]

_WHERE = {
    "DPCheckpointedAttention": "checkpointed_module",
    "DPFlashAttention": "module",
    "EnhancedDPFlashAttention": "enhanced_module",
    "LeakingPath": "release_paths",
    "PrivacyMechanismType": "mechanism_types",
    "PrivacySpent": "privacy_spent",
    "PrivacyStats": "stats",
    "PrivateMemory": "private_memory",
    "RandomizedLabels": "randomized_labels",
    "ReleasePaths": "release_paths",
    "ReleasedAttention": "transformers_models",
    "ReleasedFeatures": "released_features",
    "check_release_paths": "release_paths",
    "create_enhanced_dp_flash_attention": "enhanced_module",
    "create_research_mechanism": "mechanism_types",
    "dp_flash_attn_func": "functional",
    "dp_flash_attn_qkvpacked_func": "qkv_packed",
    "dp_flash_attn_varlen_func": "varlen",
    "dp_flash_attn_with_kvcache": "kv_cache",
    "dp_scaled_dot_product_attention": "sdpa_layout",
    "process_ledger": "default_ledger",
    "randomize_labels": "randomized_labels",
    "register_dp_attention": "transformers_attention",
    "release_attention": "transformers_models",
    "release_features": "released_features",
}


def __getattr__(name: str) -> Any:
    # On first use: reading the version, or planning without tensors, must not import torch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
