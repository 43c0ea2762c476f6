"""A mask read as what an attention problem can say: causal or not, the lengths of each batch row, one mask for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError

HIDDEN = -1e4
"""An additive mask hides where it is this or less (PRIVACY P2)."""


def visible_and_bias(name: str, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where `mask` shows a key, and what it adds there: None where that is 0 everywhere; its values are public.

    A bool mask is true where it shows. In a floating-point one the two are told apart by a public rule: -inf or <= -1e4
    hides, any other finite number is a bias.

    Raises: PrivacyParameterError for another dtype, NaN or +inf.
    """
    require(
        isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point()),
        f"{name} must be a bool or floating-point tensor",
        mask.dtype if isinstance(mask, Tensor) else type(mask).__name__,
    )
    if mask.dtype == torch.bool:
        return mask, None
    hidden = mask <= HIDDEN
    require(
        bool((hidden | torch.isfinite(mask)).all()),
        f"{name} must hold finite numbers (a bias) and -inf or numbers <= {HIDDEN:g} (hidden)",
        "NaN or +inf",
    )
    bias = torch.where(hidden, 0.0, mask)
    return ~hidden, bias if bool((bias != 0).any()) else None


class Seen(NamedTuple):
    """What a release is told of visibility."""

    causal: bool
    lengths: tuple[tuple[int, int], ...] = ()
    """(queries, keys) of each batch row; empty where all are full."""
    mask: Tensor | None = None
    """bool [S, Sk], True where it shows, the same for every batch row and head."""


def seen(name: str, shown: Tensor, *, causal: bool = False) -> Seen:
    """What shows exactly what `shown` does, bool [B, S, Sk], and `causal` does not hide.

    Raises: PrivacyParameterError where batch rows differ by more than their lengths.
    """
    if (found := said_by_lengths(shown, causal=causal)) is not None:
        return found
    if not bool((shown == shown[:1]).all()):
        raise PrivacyParameterError(
            f"{name} must show the same in every batch row, or hide the end of each, got rows that differ otherwise; "
            "put padding at the end, or release such rows one by one."
        )
    return Seen(causal, (), shown[0])


def said_by_lengths(shown: Tensor, *, causal: bool = False) -> Seen | None:
    """`shown` by lengths and a diagonal alone: bool [B, S, Sk].

    With `causal`, keys ahead of the bottom-right diagonal are hidden besides. None if no lengths say it.
    """
    B, S, Sk = shown.shape
    row, key = torch.arange(S)[:, None], torch.arange(Sk)
    shown = shown.cpu()
    if causal:
        shown = shown & (key <= row + Sk - S)
    keys = (shown.any(1) * (key + 1)).amax(1).tolist()
    rows = (shown.any(2) * (row[:, 0] + 1)).amax(1).tolist()
    for diagonal in (causal, not causal):
        found = []
        for b in range(B):
            for m, n in ((S, keys[b]), (rows[b], keys[b]), (S, Sk)):
                said = (row < m) & (key < n)
                if diagonal:
                    # a token's query must stay where its key is, or its own row would be priced as another one
                    said &= (key <= row + n - m) & (n - m == Sk - S)
                if torch.equal(said, shown[b]):
                    found.append((m, n))
                    break
        if len(found) == B:
            full = all(pair == (S, Sk) for pair in found)
            return Seen(diagonal, () if full else tuple(found))
    return None
