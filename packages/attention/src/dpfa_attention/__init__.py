"""Private attention releases: clip, calibrated noise, and a ledger line before any value leaves."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfa_attention.default_ledger import process_ledger
    from dpfa_attention.functional import dp_flash_attn_func
    from dpfa_attention.stats import PrivacyStats

__version__ = "0.1.0"
__all__ = ["PrivacyStats", "dp_flash_attn_func", "process_ledger"]

_WHERE = {"PrivacyStats": "stats", "dp_flash_attn_func": "functional", "process_ledger": "default_ledger"}


def __getattr__(name: str) -> Any:
    # On first use: reading the version, or planning without tensors, must not import torch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
