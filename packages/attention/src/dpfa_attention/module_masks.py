"""The masks of ``nn.MultiheadAttention``, which are true where they hide."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpfa_attention.biases import without_gradient
from dpfa_attention.padded_batches import Packing, ShownKeys, packing
from dpfa_attention.visible_lengths import Seen, said_by_lengths, seen, visible_and_bias
from dpfa_core.checks import require

Window = tuple[int, int]


class Masks(NamedTuple):
    """What the two masks of a call hide, True where they do, and what they add to the logits."""

    shape: tuple[int, int, int]
    """(B, S, Sk)."""
    attn: Tensor | None
    """bool [S, Sk] or [B * H, S, Sk]."""
    padding: Tensor | None
    """bool [B, Sk]."""
    bias: Tensor | None
    """[B or 1, H or 1, S, Sk], finite."""


def read_masks(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    *,
    shape: tuple[int, int, int],
    heads: int,
    gradient: bool = False,
) -> Masks:
    """Both masks of a call; an additive one hides where it is <= -1e4, and is a bias elsewhere (PRIVACY P2).

    Args: attn_mask [S, Sk] or [B * H, S, Sk], padding [B, Sk]; `shape` is (B, S, Sk); without `gradient`, a mask that
        asks for its own is refused.
    Raises: PrivacyParameterError for another shape, dtype, NaN or +inf; NotPrivateError for a gradient.
    """
    B, S, Sk = shape
    shapes = ((S, Sk), (B * heads, S, Sk))
    attn, bias = _parted("attn_mask", attn_mask, shapes, f"{shapes[0]} or {shapes[1]}", gradient=gradient)
    hides, more = _parted("key_padding_mask", padding, ((B, Sk),), f"[batch, keys], {(B, Sk)}", gradient=gradient)
    if bias is not None:
        bias = bias[None, None] if bias.dim() == 2 else bias.reshape(B, heads, S, Sk)
    if more is not None:
        more = more[:, None, None].expand(B, 1, S, Sk)
        bias = more if bias is None else bias + more
    return Masks(shape, attn, hides, bias)


def _parted(
    name: str, mask: Tensor | None, shapes: tuple[tuple[int, ...], ...], wanted: str, *, gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(bool, True where `mask` hides; what it adds elsewhere)."""
    if mask is None:
        return None, None
    shown, bias = visible_and_bias(name, mask)
    require(tuple(mask.shape) in shapes, f"{name} must be {wanted}", tuple(mask.shape))
    if mask.dtype == torch.bool:
        return mask, None  # as torch has it: true where it hides
    if not gradient:
        without_gradient(mask)
    # a bias that hides nothing is no mask, for which there would be no room beside a window
    return None if bias is not None and bool(shown.all()) else ~shown, bias


def additive(masks: Masks, out_of_sight: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """(attn_mask, key_padding_mask) for torch, of one dtype; `out_of_sight`, bool [S, Sk], hides besides."""
    attn = out_of_sight if masks.attn is None else masks.attn | out_of_sight
    if masks.bias is None:
        return attn if bool(attn.any()) else None, masks.padding
    bias = masks.bias.expand(masks.shape[0], heads, *attn.shape[-2:]).flatten(0, 1).masked_fill(attn, -math.inf)
    if masks.padding is None:
        return bias, None
    return bias, torch.zeros_like(masks.padding, dtype=bias.dtype).masked_fill(masks.padding, -math.inf)


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


def moved_padding(masks: Masks, *, causal: bool, window: Window, own: bool) -> tuple[Packing, bool] | None:
    """(what puts the real tokens of each row in front, causal or not); None where padding is at the ends anyway.

    None as well beside an `attn_mask` that is no diagonal, and a bias: they go by places.

    Raises: PrivacyParameterError for padding inside a text under a window.
    """
    (_, S, Sk), attn = masks.shape, masks.attn
    if masks.padding is None or masks.bias is not None or not own:
        return None
    if attn is not None:
        attn = attn.cpu()
        if attn.dim() != 2 or not torch.equal(attn, outside(S, Sk, causal=True, window=(-1, -1))):
            return None
        causal = True
    rows = packing(ShownKeys(causal, ~masks.padding, window), shape=masks.shape)
    return None if rows.keys is None else (rows, causal)


def as_seen(
    masks: Masks,
    *,
    heads: int,
    causal: bool,
    window: Window,
    own: bool,
) -> Seen:
    """What shows what both masks and `causal` leave to be seen.

    Args: `own` says that queries and keys are of the same tokens.
    Raises: PrivacyParameterError where batch rows differ by more than their lengths.
    """
    shape, attn_mask, padding, _ = masks
    B, S, Sk = shape
    if attn_mask is None and padding is None:
        return Seen(causal)
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
        return seen("attn_mask", shown, causal=causal)
    kept = ~padding.cpu()
    names, inside = "attn_mask and key_padding_mask", shown & kept[:, None]
    found = None if windowed else said_by_lengths(inside, causal=causal)
    if found is None and own and Sk == S:
        # the queries of padding are padding, too
        inside = inside & kept[:, :, None]
        found = said_by_lengths(inside, causal=causal)
        many = kept.sum(1)
        ends = torch.equal(kept, torch.arange(S) < many[:, None])
        if found is None and ends and bool((shown == shown[:1]).all()):
            found = Seen(causal, tuple((n, n) for n in many.tolist()), shown[0])
    return found or seen(names, inside, causal=causal)


def _for_each_row(attn_mask: Tensor, shape: tuple[int, int, int], heads: int) -> Tensor:
    """bool [B, S, Sk] on the CPU, from [S, Sk] or [B * H, S, Sk] with equal heads."""
    B, S, Sk = shape
    if attn_mask.dim() == 2:
        return attn_mask.cpu().expand(B, S, Sk)
    each = attn_mask.cpu().reshape(B, heads, S, Sk)
    require(bool((each == each[:, :1]).all()), "attn_mask must be the same for all heads", "different ones")
    return each[:, 0]
