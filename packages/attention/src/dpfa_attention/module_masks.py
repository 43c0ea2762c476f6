"""The masks of ``nn.MultiheadAttention``, which are true where they hide."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_attention.visible_lengths import causal_and_lengths, visible
from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError

Window = tuple[int, int]


def hidden(name: str, mask: Tensor | None) -> Tensor | None:
    """bool, True where `mask` hides; an additive one is read by the public rule of PRIVACY P2."""
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        return mask
    return ~visible(name, mask)


def outside(S: int, Sk: int, *, causal: bool, window: Window) -> Tensor:
    """Where causal and window hide, bottom-right: bool [S, Sk]."""
    ahead = torch.arange(Sk) - (torch.arange(S)[:, None] + Sk - S)
    out = (ahead > 0) if causal else torch.zeros(S, Sk, dtype=torch.bool)
    left, right = window
    if left >= 0:
        out |= ahead < -left
    if right >= 0:
        out |= ahead > right
    return out


def as_lengths(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    *,
    shape: tuple[int, int, int],
    heads: int,
    causal: bool,
    window: Window,
    own: bool,
) -> tuple[bool, tuple[tuple[int, int], ...]]:
    """(causal, lengths) of a release that hides what both masks and `causal` hide.

    Args: masks, True where they hide: [S, Sk] or [B * H, S, Sk], and [B, Sk]; `shape` is (B, S, Sk); `own` says
    that queries and keys are of the same tokens.
    Raises: PrivacyParameterError for a pattern that no lengths say.
    """
    B, S, Sk = shape
    if attn_mask is None and padding is None:
        return causal, ()
    windowed = window != (-1, -1)
    require(
        not windowed or attn_mask is None, "attn_mask must be None beside window_size", "a mask", "Give one of them."
    )
    require(
        not windowed or own,
        "key_padding_mask beside window_size needs self-attention",
        "cross-attention",
        "The window has no place there.",
    )
    shown = torch.ones(B, S, Sk, dtype=torch.bool) if attn_mask is None else ~_for_each_row(attn_mask, shape, heads)
    if padding is None:
        return causal_and_lengths("attn_mask", shown, causal=causal)
    wanted = (B, Sk)
    require(tuple(padding.shape) == wanted, f"key_padding_mask must be [batch, keys], {wanted}", tuple(padding.shape))
    kept = ~padding.cpu()
    try:
        if not windowed:
            return causal_and_lengths("attn_mask and key_padding_mask", shown & kept[:, None], causal=causal)
    except PrivacyParameterError:
        if not (own and Sk == S):
            raise
    # the queries of padding are padding, too
    inside = shown & kept[:, None] & kept[:, :, None]
    return causal_and_lengths("attn_mask and key_padding_mask", inside, causal=causal)


def _for_each_row(attn_mask: Tensor, shape: tuple[int, int, int], heads: int) -> Tensor:
    """bool [B, S, Sk] on the CPU, from [S, Sk] or [B * H, S, Sk] with equal heads."""
    B, S, Sk = shape
    wanted = ((S, Sk), (B * heads, S, Sk))
    require(tuple(attn_mask.shape) in wanted, f"attn_mask must be {wanted[0]} or {wanted[1]}", tuple(attn_mask.shape))
    if attn_mask.dim() == 2:
        return attn_mask.cpu().expand(B, S, Sk)
    each = attn_mask.cpu().reshape(B, heads, S, Sk)
    require(bool((each == each[:, :1]).all()), "attn_mask must be the same for all heads", "different ones")
    return each[:, 0]
