"""Which row of the batch every number of a tensor depends on, carried through the functions of a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class Coupled(Exception):
    """Why a function joins rows in another way than by adding up their own terms."""


@dataclass(frozen=True, eq=False)
class Owners:
    """The numbers at index x of dimension `dim` depend on row ``rows[x]`` only.

    Without a dimension (None) the whole tensor depends on the one row in `rows`.
    """

    dim: int | None
    rows: np.ndarray[Any, Any]

    def same(self, other: Owners) -> bool:
        """Whether the same indices belong to the same rows."""
        return self.dim == other.dim and np.array_equal(self.rows, other.rows)

    def even(self, batch: int) -> bool:
        """Whether every row of the batch owns equally many numbers."""
        counts = np.bincount(self.rows, minlength=batch)
        return bool((counts == counts[0]).all())

    def reshaped(self, before: Shape, after: Shape) -> Owners:
        """Of the same numbers in the same order in another shape.

        Raises: Coupled where one dimension does not tell the row any more.
        """
        if self.dim is None:
            return self
        inner, size = math.prod(before[self.dim + 1 :]), before[self.dim]
        below = math.prod(after)
        split: list[tuple[int, int]] = []
        for dim, length in enumerate(after):
            below //= max(length, 1)
            if inner % max(below, 1) == 0 and (below * length) % (inner * size) == 0:
                times = below * length // (inner * size)
                return Owners(dim, np.tile(np.repeat(self.rows, inner // max(below, 1)), times))
            if below >= inner and below * length <= inner * size and length > 1:
                split.append((dim, length))
        if split and math.prod(length for _, length in split) == size:
            table = self.rows.reshape([length for _, length in split])
            for axis, (dim, _) in enumerate(split):
                own = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
                if (own == own[:, :1]).all():
                    return Owners(dim, own[:, 0])
        raise Coupled(f"a change of shape from {before} to {after} that takes the rows apart")

    def aligned(self, before: Shape, after: Shape) -> Owners:
        """In the result of a function that broadcasts.

        Raises: Coupled where a tensor of one number a row meets the rows of another.
        """
        if self.dim is None:
            return self
        dim = self.dim + len(after) - len(before)
        if dim < 0 or after[dim] != before[self.dim]:
            raise Coupled(f"a result of shape {after} from rows in dimension {self.dim} of {before}")
        if dim > self.dim and after[0] == len(set(self.rows.tolist())):
            raise Coupled(f"broadcasting {before} to {after}, in which every row meets every other")
        return Owners(dim, self.rows)

    def without(self, dims: Sequence[int], kept: bool) -> Owners:
        """After other dimensions than the owners' were reduced (and stay as 1 if `kept`)."""
        if self.dim is None or kept:
            return self
        return Owners(self.dim - sum(dim < self.dim for dim in dims), self.rows)

    def picked(self, indices: Any) -> Owners:
        """After some indices of the owners' dimension were taken."""
        return Owners(self.dim, self.rows[indices])
