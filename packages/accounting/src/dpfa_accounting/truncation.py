"""Poisson sampling whose batches are cut: the plain release, and the probability that a cut is seen at all.

Without a cut the release is the plain one. Over all steps the two differ with a probability of at most s, on
both neighbours, so delta grows by (1 + e**epsilon) s (PRIVACY P7).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.stats import binom

from dpfa_core.events import PoissonSampled, TruncatedPoisson

LARGEST_POPULATION = 2**50
"""Float64 counts to there."""

STEPS = 60
"""Rounds of a search for epsilon, which usually ends after two; half as many for delta."""

NEGLIGIBLE = 1e-9
"""A share of delta for which no better epsilon is sought."""


def plain(event: TruncatedPoisson) -> PoissonSampled:
    """The release without the cut."""
    return PoissonSampled(event.sampling_probability, event.event, event.relation)


def overflow(event: TruncatedPoisson) -> float:
    """Probability that one batch is cut, rounded up; 0 if no neighbour has records enough."""
    # a neighbour may hold one record more
    most = event.population + (event.relation == "add_or_remove")
    if event.max_batch >= most:
        return 0.0
    if most > LARGEST_POPULATION:
        return 1.0
    share = float(binom.sf(event.max_batch, most, event.sampling_probability))
    return min(1.0, math.nextafter(share * (1.0 + 1e-9), 1.0))


def delta(plain_delta: Callable[[float], float], epsilon: float, tail: float) -> float:
    """A delta at `epsilon`: the least of plain_delta(e) + (1 + exp(e)) tail found for e <= epsilon.

    What holds at e holds at every larger epsilon, where the cuts alone would weigh more. Both parts are convex
    in exp(e), so the golden section closes in on the least.
    """

    def at(e: float) -> float:
        return min(1.0, plain_delta(e) + (1.0 + math.exp(e)) * tail * (1.0 + 2.0**-50))

    low, high = 0.0, min(epsilon, max(0.0, -math.log(tail)))
    least = at(high)
    if (1.0 + math.exp(high)) * tail < NEGLIGIBLE * least:
        return least
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = at(left), at(right)
    for _ in range(STEPS // 2):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = at(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = at(right)
        least = min(least, at_left, at_right)
    return least


def epsilon(plain_epsilon: Callable[[float], float], left: float, tail: float) -> float:
    """An epsilon with delta(plain, epsilon, tail) <= `left`, or infinity if none was found.

    Args: `plain_epsilon` of a delta, without cuts; it grows as its delta falls.
    """
    found = 0.0
    for _ in range(STEPS):
        # a little more than what was needed so far: then it verifies as soon as the need stops growing
        tried = found * (1.0 + 1e-9) + 1e-12
        room = left - (1.0 + math.exp(tried)) * tail * (1.0 + 2.0**-50) if tried < 700.0 else 0.0
        if room <= 0:
            return math.inf
        needed = plain_epsilon(math.nextafter(room, 0.0))
        if needed <= tried:
            return tried
        found = needed
    return math.inf
