"""Private quantiles, to choose a clip norm: by selection from a public grid, or by a noisy count that moves it.

What these functions spend belongs to the same budget as the training that uses the result. Each returns the
``events`` that it recorded: compose them with the training's own events, or calibrate the training to what
they leave, and charge both to one ledger.
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from dpfa_core.checks import fraction, integer, is_real, one_of, positive, require
from dpfa_core.events import Composed, DiscreteGaussian, Event
from dpfa_core.events import Exponential as ExponentialEvent
from dpfa_core.spec import RELATIONS, Relation
from dpfa_mechanisms.bernoulli import RandomBits
from dpfa_mechanisms.exponential import Exponential
from dpfa_mechanisms.integer_gaussian import integer_gaussian

LARGEST_STEP = 16.0
"""One step multiplies or divides a threshold by exp of this at the most, however wild the noise."""


class KeepsRecords(Protocol):
    """A ``dpfa_core.ledger.Ledger``, as far as it is needed here."""

    def record(self, event: Event, *, purpose: str, mechanism: str, backend: str) -> object: ...


Record = Callable[[Event], object] | KeepsRecords
"""Charges an event durably before it returns, or raises if the budget does not allow it."""


@dataclass(frozen=True)
class PrivateQuantile:
    """A quantile, and an interval that holds the true one; all points of the public grid."""

    value: float
    low: float
    high: float
    confidence: float
    """Of ``low <= true quantile <= high``, over the coins of the mechanism, for every data set."""
    events: tuple[Event, ...]
    """What was recorded; to be composed with whatever else the same records are used for."""
    epsilon: float
    """Of all events together."""


@dataclass(frozen=True)
class TrackedQuantile:
    """A threshold that followed a quantile from step to step."""

    value: float
    path: tuple[float, ...]
    """The threshold before the first step, and after each."""
    events: tuple[Event, ...]
    """What was recorded, one event for each step."""


def private_quantile(
    values: Sequence[float],
    quantile: float,
    *,
    epsilon: float,
    bounds: tuple[float, float],
    record: Record,
    candidates: int = 1024,
    grid: Literal["linear", "geometric"] = "linear",
    confidence: float = 0.95,
    relation: Relation = "replace",
    random_bits: RandomBits = os.urandom,
) -> PrivateQuantile:
    """The quantile of values of which one record has one each, by the exponential mechanism.

    The true quantile is the least value v with at least ``quantile * n`` of the values <= v, after the values
    are clipped to `bounds` (NaN counts as the lower one). Half of epsilon picks the cell between neighbouring
    candidates that holds it, whose upper end is `value`; a quarter each picks the ends of the interval.

    Guarantee: tested (the exact law; coverage). Pure epsilon.
    Args: `candidates`, points of the public grid in `bounds`, at least 2; "geometric" needs bounds > 0.
    `relation`, that of the ledger: under "replace" n is public, under "add_or_remove" its move is paid for too.
    `record` is called with one event for all three selections before the first is made.
    Raises: PrivacyParameterError; whatever `record` raises.
    Source: McSherry & Talwar 2007 (Theorem 6: utility); Smith 2011 (quantiles).
    """
    fraction("quantile", quantile, zero=False)
    positive("epsilon", epsilon)
    fraction("confidence", confidence, zero=False)
    one_of("relation", relation, RELATIONS)
    points = _grid(bounds, candidates, grid)
    shares = (epsilon / 2.0, epsilon / 4.0, epsilon / 4.0)
    require(shares[-1] > 0, "epsilon must be a normal number", epsilon)
    events: tuple[Event, ...] = tuple(ExponentialEvent(share) for share in shares)
    _charge(record, Composed(events), Exponential.name)

    q = Fraction(quantile)
    ordered = sorted(min(max(float(value), points[0]), points[-1]) if value == value else points[0] for value in values)
    # How many values lie at or below a candidate, less quantile * n. One value that is replaced moves each of
    # these numbers by at most 1; one that comes or goes moves it by 1 - quantile or by quantile, n included.
    sensitivity = Fraction(1) if relation == "replace" else max(q, 1 - q)
    excess = [bisect_right(ordered, point) - q * len(ordered) for point in points]

    # Cell k reaches from candidate k to candidate k + 1. Its score for a target rank is minus the distance of
    # the target from [excess_k, excess_(k+1)], and moves no further than the ends do. Every value lies above
    # the lower side of the first cell and below the upper side of the last, so these count as -inf and +inf:
    # the cells cover all ranks, and some cell has the score 0 whatever the data are.
    #
    # With probability >= 1 - beta a selection with epsilon' from M cells therefore has a distance of at most
    # t = 2 sensitivity / epsilon' * ln(M / beta). Let beta = (1 - confidence) / 2.
    # Target -s with s > t: excess_k <= t - s < 0, fewer than quantile * n values are <= candidate k, and the
    # true quantile lies above it; for the first cell it does so anyway.
    # Target +s: excess_(k+1) >= s - t >= 0, and the true quantile is at most candidate k + 1; for the last
    # cell it is so anyway. Both hold with probability >= 1 - 2 beta = confidence. Widening the interval until
    # it holds `value` keeps that.
    cells = len(points) - 1
    beta = (1.0 - confidence) / 2.0
    logarithm = Fraction(math.log(cells / beta) * (1.0 + 2.0**-40) + 2.0**-40)
    shift = 2 * sensitivity / Fraction(shares[1]) * logarithm

    def pick(target: Fraction, share: float) -> int:
        scores = [
            -max(
                Fraction(0),
                excess[cell] - target if cell > 0 else Fraction(0),
                target - excess[cell + 1] if cell < cells - 1 else Fraction(0),
            )
            for cell in range(cells)
        ]
        return Exponential().select(scores, sensitivity, share, random_bits)

    value = points[pick(Fraction(0), shares[0]) + 1]
    low = points[pick(-shift, shares[1])]
    high = points[pick(shift, shares[2]) + 1]
    return PrivateQuantile(value, min(low, value), max(high, value), confidence, events, epsilon)


def noisy_count_quantile(
    batches: Iterable[Sequence[float]],
    quantile: float,
    *,
    noise_multiplier: float,
    expected_size: float,
    initial: float,
    steps: int,
    record: Record,
    learning_rate: float = 0.2,
    relation: Relation = "add_or_remove",
    random_bits: RandomBits = os.urandom,
) -> TrackedQuantile:
    """Move a threshold towards a quantile, one noisy count at a time.

    A step counts the values of its batch at or below the threshold, less those above: an integer that one
    record moves by 1, or by 2 if it is replaced. With discrete Gaussian noise on the integers it gives the
    noisy share of values below, and the threshold is multiplied by exp(-learning_rate (share - quantile)).

    Guarantee: tested (the law of the noise is exact, sampled without floating point).
    Args: `batches` in the order of the steps; those beyond `steps` are not looked at. `noise_multiplier` = scale
    of the noise / the sensitivity of the count. `expected_size` of a batch, a public constant, never the size
    that was drawn. `initial` > 0. `record` is called with the event of each step before its count is used: it is
    the event of a batch as given, so give batches that hold all records, or amplify what is recorded by the
    sampler that made them.
    Raises: PrivacyParameterError, also for fewer batches than `steps`; whatever `record` raises.
    Source: Andrew, Thakkar, McMahan & Ramaswamy 2021; Canonne, Kamath & Steinke 2020, Algorithm 3.
    """
    fraction("quantile", quantile, zero=False)
    positive("noise_multiplier", noise_multiplier, remedy="Without noise a count is not private.")
    positive("expected_size", expected_size)
    positive("initial", initial)
    integer("steps", steps, least=1)
    positive("learning_rate", learning_rate)
    one_of("relation", relation, RELATIONS)
    event = DiscreteGaussian(noise_multiplier)
    variance = (Fraction(noise_multiplier) * (2 if relation == "replace" else 1)) ** 2
    threshold, path, events = float(initial), [float(initial)], []
    ordered = iter(batches)
    for step in range(steps):
        batch = next(ordered, None)
        if batch is None:
            require(False, f"batches must hold {steps} batches", step)
            break
        _charge(record, event, "discrete_gaussian")
        events.append(event)
        below = sum(1 if value <= threshold else -1 for value in batch)
        share = 0.5 + (below + integer_gaussian(variance, random_bits)) / (2.0 * expected_size)
        move = -learning_rate * (share - quantile)
        moved = threshold * math.exp(max(-LARGEST_STEP, min(LARGEST_STEP, move)))
        # beyond the range of floats the threshold stays where it is: noise alone can bring it there
        threshold = moved if 0.0 < moved < math.inf else threshold
        path.append(threshold)
    return TrackedQuantile(threshold, tuple(path), tuple(events))


def _grid(bounds: tuple[float, float], candidates: int, grid: str) -> list[float]:
    good = isinstance(bounds, tuple) and len(bounds) == 2 and all(is_real(end) and math.isfinite(end) for end in bounds)
    require(good and bounds[0] < bounds[1], "bounds must be two finite numbers (low, high), low < high", bounds)
    integer("candidates", candidates, least=2)
    one_of("grid", grid, ("linear", "geometric"))
    low, high = float(bounds[0]), float(bounds[1])
    shares = [index / (candidates - 1) for index in range(candidates)]
    if grid == "geometric":
        require(low > 0, "a geometric grid needs bounds > 0", bounds)
        points = [math.exp((1.0 - share) * math.log(low) + share * math.log(high)) for share in shares]
    else:
        points = [(1.0 - share) * low + share * high for share in shares]
    points[0], points[-1] = low, high
    rising = all(left < right for left, right in itertools.pairwise(points))
    require(rising, "bounds must lie far enough apart for this many candidates", (bounds, candidates))
    return points


def _charge(record: Record, event: Event, mechanism: str) -> None:
    if callable(record):
        record(event)
    else:
        record.record(event, purpose="calibration", mechanism=mechanism, backend="none")
