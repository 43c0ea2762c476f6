"""Who sees whom in one batch row, as arrays: sums over the rows that see a key, and over the keys a row sees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpfa_core.spec import AttentionProblem
from dpfa_core.visibility import lengths, visible_range

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Visible:
    """Visibility in one batch row: ranges [start, stop) of keys, or a matrix where a packed mask says so."""

    q_len: int
    kv_len: int
    start: Integers
    stop: Integers
    matrix: NDArray[np.bool_] | None
    """(q_len, kv_len); None where the ranges say it all."""

    @classmethod
    def of(cls, problem: AttentionProblem, batch_row: int = 0) -> Visible:
        """Read from the public shapes alone."""
        q_len, kv_len = lengths(problem, batch_row)
        unmasked = dataclasses.replace(problem, mask=None)
        ranges = [visible_range(unmasked, row, batch_row) for row in range(q_len)]
        start = np.array([first for first, _ in ranges], dtype=np.int64)
        stop = np.array([last for _, last in ranges], dtype=np.int64)
        if problem.mask is None:
            return cls(q_len, kv_len, start, stop, None)
        bits = np.unpackbits(np.frombuffer(problem.mask, dtype=np.uint8), count=problem.q_len * problem.kv_len)
        matrix = bits.reshape(problem.q_len, problem.kv_len)[:q_len, :kv_len].astype(bool)
        keys = np.arange(kv_len)
        return cls(q_len, kv_len, start, stop, matrix & (keys >= start[:, None]) & (keys < stop[:, None]))

    @property
    def counts(self) -> Integers:
        """(q_len,): n_i, the number of keys that row i sees."""
        return self.stop - self.start if self.matrix is None else self.matrix.sum(axis=1, dtype=np.int64)

    @property
    def own_key(self) -> Integers:
        """(q_len,): the key at the position of row i, bottom-right aligned; negative where there is none."""
        return np.arange(self.q_len, dtype=np.int64) + (self.kv_len - self.q_len)

    @property
    def sees_itself(self) -> NDArray[np.bool_]:
        """(q_len,): whether row i sees the key at its own position."""
        own = self.own_key
        if self.matrix is None:
            return (own >= self.start) & (own < self.stop)
        itself = np.zeros(self.q_len, dtype=bool)
        here = own >= 0
        itself[here] = self.matrix[here, own[here]]
        return itself

    def over_rows(self, weights: Floats) -> Floats:
        """(kv_len,): for each key, the sum of `weights` (q_len,) over the rows that see it."""
        if self.matrix is not None:
            sums = np.zeros(self.kv_len)
            for rows in self._some_rows():
                sums += weights[rows] @ self.matrix[rows]
            return sums
        steps = np.zeros(self.kv_len + 1)
        np.add.at(steps, self.start, weights)
        np.subtract.at(steps, self.stop, weights)
        # a sum that has left all its terms is 0, not the round-off they left behind
        return np.maximum(np.cumsum(steps)[: self.kv_len], 0.0)

    def over_keys(self, weights: Floats) -> Floats:
        """(q_len,): for each row, the sum of `weights` (kv_len,) over the keys it sees."""
        if self.matrix is not None:
            parts = [self.matrix[rows] @ weights for rows in self._some_rows()]
            return np.concatenate([np.zeros(0), *parts])
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        return np.asarray(np.maximum(sums[self.stop] - sums[self.start], 0.0), dtype=np.float64)

    def _some_rows(self) -> list[slice]:
        """A product turns bits into float64, so it takes a few rows at a time."""
        return [slice(first, first + ROWS_AT_ONCE) for first in range(0, self.q_len, ROWS_AT_ONCE)]
