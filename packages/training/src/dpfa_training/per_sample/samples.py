"""Where a tensor keeps the samples of the batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Samples:
    """One dimension counts the samples, alone or joined with another.

    Args:
        dim: the dimension, from the front.
        joined: "no" for (B, ...), "major" for (B*T, ...) with a sample's rows together, "minor" for (T*B, ...).
        times: the values of T that were seen.
    """

    dim: int
    joined: Literal["no", "major", "minor"] = "no"
    times: frozenset[int] = field(default=frozenset(), compare=False)

    def fits(self, shape: torch.Size, rows: int) -> bool:
        """Whether `rows` samples can be laid out this way in a tensor of `shape`."""
        if len(shape) <= self.dim:
            return False
        size = shape[self.dim]
        return size == rows if self.joined == "no" else size % rows == 0

    def first(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """`x` with the samples alone in dimension 0."""
        if self.joined == "no":
            return x.movedim(self.dim, 0) if self.dim else x
        if self.joined == "major":
            return x.unflatten(self.dim, (rows, -1)).movedim(self.dim, 0)  # type: ignore[no-any-return, no-untyped-call]
        return x.unflatten(self.dim, (-1, rows)).movedim(self.dim + 1, 0)  # type: ignore[no-any-return, no-untyped-call]

    def tokens(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """`x` as (B, T, d), d its last dimension."""
        x = self.first(x, rows)
        return x if x.dim() == 3 else x.reshape(rows, -1, x.shape[-1])

    def spread(self, copies: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor | None:
        """(B, *own) as what broadcasts against a tensor of `shape` laid out this way; None if it cannot.

        Args:
            rank: number of dimensions of the result that both are broadcast to.
        """
        rows, own = copies.shape[0], (1,) * (rank - copies.dim() + 1) + tuple(copies.shape[1:])
        at = self.dim - len(shape) + rank
        if len(own) != rank or at < 0:
            return None
        if own[at] != 1:  # joined with a dimension of the parameter's own
            if self.joined == "no" or own[at] * rows != shape[self.dim]:
                return None
            copies = copies.reshape(rows, *own)
            after = at + 1 if self.joined == "minor" else at
            return copies.movedim(0, after).flatten(at, at + 1)
        copies = copies.reshape(rows, *own[:at], *own[at + 1 :]).movedim(0, at)
        if self.joined == "no":
            return copies
        times = shape[self.dim] // rows
        before, after = copies.shape[:at], copies.shape[at + 1 :]  # type: ignore[assignment]
        if self.joined == "major":
            return copies.unsqueeze(at + 1).expand(*before, rows, times, *after).flatten(at, at + 1)  # type: ignore[misc]
        return copies.unsqueeze(at).expand(*before, times, rows, *after).flatten(at, at + 1)  # type: ignore[misc]


def find(
    few: torch.Size, few_rows: int, more: torch.Size, more_rows: int, joined: Literal["", "major", "minor"]
) -> Samples | None:
    """The layout of a tensor that had shape `few` with `few_rows` samples and `more` with `more_rows`.

    Args:
        joined: how equal samples lay in dimension 0 of the second tensor; "" for neither way.

    Returns: None for a tensor that does not follow the number of samples.
    Raises: ValueError if it follows in another way.
    """
    if few == more:
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(few, more, strict=False)) if a != b]
    if len(few) != len(more) or len(changed) != 1:
        raise ValueError
    (dim,) = changed
    times, rest = divmod(few[dim], few_rows)
    if rest or more[dim] != times * more_rows:
        raise ValueError
    if times == 1:
        return Samples(dim)
    if dim != 0 or not joined:
        raise ValueError
    return Samples(0, joined, frozenset({times}))
