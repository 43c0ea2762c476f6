"""How many rows to hold at once, by the clock: small parts stay in the cache, large ones fill the processor."""

from __future__ import annotations

TRIES, ROWS = 3, 32
"""Parts of each size that are timed, and rows in them, at least; the quickest part counts."""

SIZES, WORTH = 3, 1.05
"""From so many sizes on, one that is not quicker than all smaller ones by this factor is the last: the next one doubles
the memory."""

NEARLY = 1.02
"""The smallest size within this factor of the fastest is taken: it needs the least memory."""

PATIENCE = 3
"""Parts smaller than the size on trial, one after the other, that say that draws are no larger."""


class PartTiming:
    """Doubles the rows of a part while that pays, then chooses. Only rounding depends on the choice."""

    def __init__(self, first: int, fitting: int) -> None:
        self.chosen: int | None = None
        """Rows to take from here on; None while sizes are tried."""
        self._size, self._fitting = min(first, fitting), fitting
        self._seconds: dict[int, list[float]] = {}
        self._missed = 0

    def rows(self) -> int:
        """The largest part at the moment."""
        return self._size if self.chosen is None else self.chosen

    def took(self, rows: int, seconds: float) -> None:
        """A part of `rows` rows was clipped after that many seconds."""
        if self.chosen is not None:
            return
        if rows != self._size:
            self._missed += rows < self._size
            if self._missed == PATIENCE:
                self._choose()
            return
        self._missed = 0
        tries = self._seconds.setdefault(self._size, [])
        tries.append(seconds / rows)
        if len(tries) < TRIES or len(tries) * rows < ROWS:
            return
        *smaller, now = (min(found) for found in self._seconds.values())
        slow = len(smaller) + 1 >= SIZES and WORTH * now > min(smaller)
        if slow or 2 * self._size > self._fitting:
            self._choose()
        else:
            self._size *= 2

    def _choose(self) -> None:
        quickest = {size: min(found) for size, found in self._seconds.items()}
        best = min(quickest.values(), default=0.0)
        nearly = [size for size, found in quickest.items() if found <= NEARLY * best]
        self.chosen = min(nearly, default=self._fitting)
