"""Padding anywhere in a batch: real tokens go to the front of their row, where lengths say which they are.

A release says by lengths what a padded batch shows. Putting the visible keys of each row in front, in their order, and
the queries of the same tokens likewise, makes lengths of any padding, and keeps a token's query where its key is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpfa_core.checks import require


@dataclass(frozen=True)
class ShownKeys:
    """What the queries of a batch see, without a matrix of it: the diagonal, a window, and the padding."""

    causal: bool
    keys: Tensor | None = None
    """bool [B, Sk], False where a key is padding; None where there is none."""
    window: tuple[int, int] = (-1, -1)
    """flash-attn's meaning, bottom-right."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of each row go, and the lengths that then show the real ones."""

    lengths: tuple[tuple[int, int], ...] = ()
    """(queries, keys) of each row; empty where nothing is padded."""
    queries: Tensor | None = None
    """[B, S]: the row that comes to each place; None where all stay."""
    keys: Tensor | None = None
    """[B, Sk]; the same object where queries and keys are of the same tokens."""

    def packed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, ...] and [B, Sk, ...] with the real tokens in front."""
        if k is q and v is q and self.queries is self.keys:
            q = _moved(q, self.queries)
            return q, q, q
        return _moved(q, self.queries), _moved(k, self.keys), _moved(v, self.keys)

    def unpacked(self, out: Tensor) -> Tensor:
        """[B, S, ...], each row back in its place."""
        return out if self.queries is None else _moved(out, self.queries.argsort(1))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths are numbers that a graph would keep as constants
def packing(shown_keys: ShownKeys, *, shape: tuple[int, int, int]) -> Packing:
    """The packing of a batch of self-attention whose last S keys are those of its queries.

    Guarantee: tested (equal to masked attention for padding left, right and in between, with and without a cache).
    Args: `shape` is (B, S, Sk), Sk >= S.
    Raises: PrivacyParameterError for more queries than keys, a mask of another shape, or padding inside a text under a
        window.
    """
    B, S, Sk = shape
    keys = shown_keys.keys
    require(Sk >= S, f"the {S} queries must stand at the last of as many keys or more", Sk)
    if keys is None:
        return Packing()
    require(tuple(keys.shape) == (B, Sk), f"a padding mask must be [batch, keys], {(B, Sk)}", tuple(keys.shape))
    shown = keys.detach().cpu()
    if bool(shown.all()):
        return Packing()
    # a window counts places, and those on both sides of a gap would come closer
    gaps = (shown[:, 1:] & ~shown[:, :-1]).sum(1) + shown[:, 0] > 1
    require(
        shown_keys.window == (-1, -1) or not bool(gaps.any()),
        "padding under a sliding window must be at the ends of a row",
        f"padding inside of row {int(gaps.nonzero()[0]) if bool(gaps.any()) else 0}",
    )
    rows = shown[:, Sk - S :]
    lengths = tuple(zip(rows.sum(1).tolist(), shown.sum(1).tolist(), strict=True))
    keys_in_front = _front(shown)
    return Packing(lengths, keys_in_front if Sk == S else _front(rows), keys_in_front)


def _front(shown: Tensor) -> Tensor | None:
    """[B, n]: the order that puts the shown ones in front; None where they are there."""
    order = (~shown).long().argsort(dim=1, stable=True)
    return None if bool((order == torch.arange(shown.shape[1])).all()) else order


def _moved(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.take_along_dim(x, order.to(x.device)[(..., *[None] * (x.dim() - 2))], 1)
