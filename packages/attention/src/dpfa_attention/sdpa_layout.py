"""The layout and names of torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dpfa_attention.biases import without_gradient
from dpfa_attention.functional import released
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.visible_lengths import Seen, seen, visible_and_bias
from dpfa_core.checks import require


def dp_scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **promise: Any,
) -> Tensor | tuple[Tensor, PrivacyStats]:
    """A release in the layout [B, H, S, D], with the arguments of ``torch.nn.functional``'s function.

    A mask is public: True shows a key, -inf or a number <= -1e4 hides it, any other number is added to its logit
    before that is bounded. It hides the same in all heads; batch rows may differ in where they end. What it adds may
    differ between heads and rows, and has no gradient.
    A query that sees no key gets noise around zero.

    Guarantee: tested (equal to torch's function with epsilon inf; a hidden key changes nothing).
    Args:
        query: [B, H, S, D]; key, value: [B, Hk, Sk, D]; enable_gqa allows Hk < H.
        attn_mask: bool or floating-point, broadcast to [B, H, S, Sk].
        is_causal: for S == Sk only. torch aligns other shapes top-left; ``dp_flash_attn_func(causal=True)``
            aligns them bottom-right.
        scale: of the logits; None is 1 / sqrt(D).
        promise: the keyword arguments of ``dp_flash_attn_func``; `epsilon` and `delta` are required.
    Returns: out [B, H, S, D]; with return_privacy_stats=True the pair (out, PrivacyStats).
    Raises: PrivacyParameterError for a mask that cannot be said so; and as ``dp_flash_attn_func``.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        good = isinstance(x, Tensor) and x.dim() == 4
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        require(good, f"{name} must be a tensor [batch, heads, length, head_dim]", shape)
    B, H, S, _ = query.shape
    Hk, Sk = key.shape[1:3]
    require(
        enable_gqa or Hk == H,
        f"key must have the {H} heads of query",
        Hk,
        "enable_gqa=True lets query heads share one.",
    )
    require(
        not is_causal or Sk == S,
        "is_causal needs as many queries as keys",
        (S, Sk),
        "torch aligns this top-left; dp_flash_attn_func(causal=True) aligns it bottom-right.",
    )
    require(
        attn_mask is None or not is_causal,
        "is_causal must be False beside attn_mask",
        is_causal,
        "Put the diagonal into the mask.",
    )
    what, bias = Seen(is_causal), None
    if attn_mask is not None:
        shown, bias = read_mask(attn_mask, B, H, S, Sk)
        what = seen("attn_mask", shown)
    result = released(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        **what._asdict(),
        dropout_p=dropout_p,
        softmax_scale=scale,
        bias=bias,
        **promise,
    )
    if isinstance(result, Tensor):
        return result.transpose(1, 2)
    out, stats = result
    return out.transpose(1, 2), stats


def read_mask(mask: Tensor, B: int, H: int, S: int, Sk: int) -> tuple[Tensor, Tensor | None]:
    """(visible, bool [B, S, Sk]; bias, [B or 1, H or 1, S, Sk])."""
    shown, bias = visible_and_bias("attn_mask", mask)
    without_gradient(mask)
    good = shown.dim() <= 4 and all(n in (1, m) for n, m in zip(shown.shape[::-1], (Sk, S, H, B), strict=False))
    require(good, f"attn_mask must broadcast to {[B, H, S, Sk]}", list(mask.shape))
    shown = shown[(None,) * (4 - shown.dim())]
    first = shown[:, :1]
    require(bool((shown == first).all()), "attn_mask must hide the same for all heads", "different ones")
    if bias is not None:
        bias = bias.detach()[(None,) * (4 - bias.dim())]
        bias = bias.expand(*bias.shape[:2], S, Sk)
    return first.expand(B, 1, S, Sk)[:, 0], bias
