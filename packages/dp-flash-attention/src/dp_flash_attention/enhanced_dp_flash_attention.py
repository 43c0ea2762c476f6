"""The research module and what it is made of."""

from __future__ import annotations

from dpfa_attention import (
    EnhancedDPFlashAttention,
    PrivacyMechanismType,
    create_enhanced_dp_flash_attention,
    create_research_mechanism,
)

__all__ = [
    "EnhancedDPFlashAttention",
    "PrivacyMechanismType",
    "create_enhanced_dp_flash_attention",
    "create_research_mechanism",
]
