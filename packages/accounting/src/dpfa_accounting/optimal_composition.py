"""The best that can be said of several releases of which only (epsilon, delta) is known.

An (epsilon, delta)-private release is dominated by one that fails openly with probability delta and else
answers by randomised response, whose loss is +-epsilon. Of equal ones the sum of losses is binomial and is
summed term by term; of different ones the sums are put on a grid and convolved, without any FFT.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from dpfa_core.checks import fraction, integer, non_negative, require
from dpfa_core.events import EpsilonDelta

Masses = NDArray[np.float64]

LOG_GAMMA_ERROR = 2.0**-48
"""Assumed relative error of ``scipy.special.gammaln`` and of the sums around it."""

UNDERFLOW = 2.0**-1000
"""Above the sum of all terms that float64 cannot hold."""

GRID_POINTS = 2**14
"""Of the losses of different releases together."""

DEVIATIONS = 20.0
"""Half the grid's width, in the root of the summed squares of epsilon: beyond it lies less than e**-200."""

GRID_ERROR = 2.0**-36
"""Above the relative error of one convolution's sums of at most GRID_POINTS non-negative products."""


UNLIKELY = 1e-40
"""Probability at either end that is moved to the private side after each convolution."""


class OptimalComposition:
    """Composition of black boxes: exact for equal ones, a bound of it for different ones.

    Guarantee: tested (60 digits, brute force over all outcomes, another library); not below the exact curve.
    Args: `releases` are EpsilonDelta events, or pairs (event, count).
    Source: Kairouz, Oh & Viswanath 2015, Theorems 3.3 and 3.5.
    """

    def __init__(self, releases: Iterable[EpsilonDelta | tuple[EpsilonDelta, int]]) -> None:
        self._counts: Counter[float] = Counter()
        log_kept = 0.0
        for item in releases:
            event, count = item if isinstance(item, tuple) else (item, 1)
            require(isinstance(event, EpsilonDelta), "optimal composition takes EpsilonDelta events", event)
            integer("count", count, least=1)
            log_kept += count * math.log1p(-event.delta)
            if event.epsilon > 0:
                self._counts[event.epsilon] += count
        self._failure = min(1.0, -math.expm1(log_kept) * (1.0 + 2.0**-40))
        self._basic = math.fsum(epsilon * count for epsilon, count in self._counts.items()) * (1.0 + 2.0**-50)
        self._losses: tuple[Masses, Masses, float] | None = None

    @property
    def failure(self) -> float:
        """The probability that some release fails openly: the least delta with a finite epsilon."""
        return self._failure

    def delta(self, epsilon: float) -> float:
        """An upper bound on delta at `epsilon`, rounded up."""
        non_negative("epsilon", epsilon)
        excess = 0.0
        if epsilon < self._basic:
            losses, masses, lost = self._losses = self._losses or self._distribution()
            gaps = losses - epsilon
            first = int(np.searchsorted(gaps, 0.0, side="right"))
            excess = float(np.dot(masses[first:], -np.expm1(-gaps[first:]))) * (1.0 + GRID_ERROR) + lost
        return min(1.0, (self._failure + (1.0 - self._failure) * min(1.0, excess)) * (1.0 + 2.0**-50))

    def epsilon(self, delta: float) -> float:
        """An upper bound on epsilon at `delta`, rounded up; infinite where the releases' own deltas exceed it.

        Args: 0 <= delta < 1.
        """
        fraction("delta", delta)
        if self._failure * (1.0 + 2.0**-50) > delta:
            return math.inf
        if self.delta(0.0) <= delta:
            return 0.0
        # `high` keeps delta at every turn
        low, high = 0.0, self._basic
        while high - low > 1e-12 * high:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.delta(middle) <= delta else (middle, high)
        return high

    def _distribution(self) -> tuple[Masses, Masses, float]:
        """(losses in order, their probabilities, delta that lies beyond them); each rounded to the private side."""
        groups = [_binomial(epsilon, count) for epsilon, count in self._counts.items()]
        if len(groups) == 1:
            return (*groups[0], UNDERFLOW)
        return _convolved(groups, self._step())

    def _step(self) -> float:
        squares = math.fsum(count * epsilon**2 for epsilon, count in self._counts.items())
        width = min(2.0 * self._basic, 2.0 * DEVIATIONS * math.sqrt(squares) + max(self._counts))
        return width / GRID_POINTS


def _binomial(epsilon: float, count: int) -> tuple[Masses, Masses]:
    """Losses of `count` randomised responses, ascending, with their probabilities, both rounded up."""
    ups = np.arange(count + 1, dtype=np.float64)
    downs = count - ups
    log_up = -math.log1p(math.exp(-epsilon))
    log_down = log_up - epsilon
    choose = gammaln(count + 1.0) - gammaln(ups + 1.0) - gammaln(downs + 1.0)
    size = 3.0 * float(gammaln(count + 1.0)) - ups * log_up - downs * log_down + 3.0
    masses = np.exp(choose + ups * log_up + downs * log_down + LOG_GAMMA_ERROR * size)
    losses = (ups - downs) * epsilon + 2.0**-50 * count * epsilon
    likely = masses > 0.0
    return losses[likely], masses[likely]


def _convolved(groups: list[tuple[Masses, Masses]], step: float) -> tuple[Masses, Masses, float]:
    """The sum of independent losses on a grid of `step`, without what is too unlikely to matter."""
    lost, start, total = UNDERFLOW, 0, np.ones(1)
    for losses, masses in groups:
        first, part = _on_grid(losses, masses, step)
        total = np.convolve(total, part) * (1.0 + GRID_ERROR)
        start += first
        # an unlikely gain is counted as failure, an unlikely small loss as the least that is kept
        beyond = np.cumsum(total[::-1])[::-1]
        keep = max(1, int(np.searchsorted(-beyond, -UNLIKELY)))
        lost += float(beyond[keep]) * (1.0 + GRID_ERROR) if keep < len(total) else 0.0
        total = total[:keep]
        below = np.cumsum(total)
        cut = min(len(total) - 1, int(np.searchsorted(below, UNLIKELY)))
        if cut:
            total = np.concatenate([[float(below[cut])], total[cut + 1 :]])
            start += cut
    return (start + np.arange(len(total), dtype=np.float64)) * step, total, lost


def _on_grid(losses: Masses, masses: Masses, step: float) -> tuple[int, Masses]:
    """Each loss as two on the grid, with the same probability under both neighbours.

    Joining the two again is post-processing, so the grid's pair dominates.
    """
    # the shift is above what rounding can move between the two
    raised = losses + step * 2.0**-20
    below = np.floor(raised / step)
    share = np.expm1(-(raised - below * step)) / math.expm1(-step)
    first = int(below[0])
    cells = (below - first).astype(np.int64)
    grid = np.zeros(int(cells[-1]) + 2)
    np.add.at(grid, cells, masses * np.clip(1.0 - share, 0.0, 1.0))
    np.add.at(grid, cells + 1, masses * np.clip(share, 0.0, 1.0))
    return first, grid
