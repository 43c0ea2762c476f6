"""Queries, keys and values in one tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dpfa_attention.functional import dp_flash_attn_func
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import require


def dp_flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **promise: Any,
) -> Tensor | tuple[Tensor, PrivacyStats]:
    """``dp_flash_attn_func`` of qkv[:, :, 0], qkv[:, :, 1] and qkv[:, :, 2].

    Guarantee: tested (equal to the call with three tensors).
    Args:
        qkv: [B, S, 3, H, D].
        promise: the keyword arguments of ``dp_flash_attn_func``; `epsilon` and `delta` are required.
    Returns: out [B, S, H, D]; with return_privacy_stats=True the pair (out, PrivacyStats).
    Raises: as ``dp_flash_attn_func``.
    """
    require(
        isinstance(qkv, Tensor) and qkv.dim() == 5 and qkv.shape[2] == 3,
        "qkv must be a tensor [batch, length, 3, heads, head_dim]",
        list(qkv.shape) if isinstance(qkv, Tensor) else type(qkv).__name__,
    )
    q, k, v = qkv.unbind(2)
    return dp_flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        **promise,
    )
