"""Releases of which only (epsilon, delta) is used: what a sample of one costs.

Composed inside one sample, the parts are one release to the sampler: epsilons and deltas add up first, and the
sum is amplified once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dpfa_accounting import randomized_response
from dpfa_core.events import (
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
)

UP = 1.0 + 2.0**-46
"""Above the rounding of a few float64 operations."""


def guarantee(event: Event) -> tuple[float, float] | None:
    """(epsilon, delta) of a release that is known by it; None for others."""
    match event:
        case EpsilonDelta(epsilon, delta):
            return epsilon, delta
        case Exponential(epsilon):
            return epsilon, 0.0
        case Laplace(noise_multiplier):
            return UP / noise_multiplier, 0.0
        case RandomizedResponse():
            return randomized_response.epsilon(event), 0.0
    return None


def together(releases: Iterable[tuple[Event, int]]) -> tuple[float, float] | None:
    """Basic composition: the sums of epsilons and of deltas, rounded up; None if a part has no guarantee."""
    epsilons, deltas = [], []
    for event, count in releases:
        known = guarantee(event)
        if known is None:
            return None
        epsilons.append(known[0] * count)
        deltas.append(known[1] * count)
    return _sum(epsilons), _sum(deltas)


def amplified(event: PoissonSampled | FixedSizeSampled, parts: Iterable[tuple[Event, int]]) -> Event | None:
    """What a sample of `parts` costs by the general theorems, or None where they do not apply.

    Poisson sampling of an (epsilon, delta) release under add_or_remove, and sampling of m among n records under
    replace, are (log(1 + q (e**epsilon - 1)), q delta), with q = m / n for the latter.

    Source: Balle, Barthe & Gaboardi 2018, Theorems 8 and 9.
    """
    match event:
        case PoissonSampled(probability, _, "add_or_remove"):
            share = probability
        case FixedSizeSampled(size, population, _, "replace"):
            share = min(1.0, math.nextafter(size / population, 1.0))
        case _:
            return None
    known = together(parts)
    if known is None:
        return None
    epsilon, delta = known
    return subsampled(epsilon, delta, share) if epsilon < math.inf and delta < 1.0 else NonPrivate()


def subsampled(epsilon: float, delta: float, share: float) -> EpsilonDelta:
    """(log(1 + share (e**epsilon - 1)), share delta), rounded up; never above what is not sampled."""
    if epsilon < 30.0:
        less = math.log1p(share * math.expm1(epsilon))
    else:
        less = max(0.0, epsilon + math.log(share + (1.0 - share) * math.exp(-epsilon)))
    return EpsilonDelta(min(epsilon, less * UP), min(delta, math.nextafter(share * delta, 1.0)))


def _sum(values: list[float]) -> float:
    """Rounded up."""
    if any(value == math.inf for value in values):
        return math.inf
    total = sum(values)
    return total * UP if len(values) > 1 or total else total
