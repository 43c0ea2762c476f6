"""What outputs alone prove: a lower bound on epsilon from many releases of two neighbours.

The event is learnt from some of the outputs and counted on the others. Counts are turned into probabilities by
Clopper and Pearson's intervals, probabilities into mu or epsilon. A bound above the claim refutes the claim. A bound
far below it says that noise is wasted, or that the audit is weak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binomtest

from dpfa_verification.truth.profiles import gaussian_epsilon

Outputs = NDArray[np.float64]
"""One release in each row: [trials, numbers]."""

CONFIDENCE = 0.999
TRAINING_SHARE = 0.2
"""Of the trials, to learn the event from."""

TAILS = 12
"""Thresholds that are tried on the training trials, for mechanisms of any kind."""


@dataclass(frozen=True)
class Audit:
    """Lower bounds that hold together with `confidence`, over the trials' randomness."""

    mu: float
    """If the mechanism is mu-GDP, as Gaussian noise is, its mu is at least this."""
    epsilon: float
    """Of that mu at `delta`, by the exact Gaussian formula."""
    epsilon_of_any: float
    """For a mechanism of any kind: ln((l - delta) / u)."""
    delta: float
    trials: int
    """For each of the two neighbours, that were counted."""
    confidence: float = CONFIDENCE


def audit(one: Outputs, two: Outputs, delta: float, confidence: float = CONFIDENCE) -> Audit:
    """Bounds from releases of two neighbours, each row of each array drawn independently.

    The statistic is Fisher's discriminant, which is the likelihood ratio's logarithm for Gaussian outputs of any one
    covariance: noise that is shared between numbers shows in it.

    Guarantee: tested (exact laws; refutes noise that is short or shared, does not refute noise that is right).
    Args: one, two: as many rows each, at least 100 times their columns.
    """
    learnt = int(TRAINING_SHARE * min(len(one), len(two)))
    counted = min(len(one), len(two)) - learnt
    direction = _discriminant(one[:learnt], two[:learnt])
    first, second = one @ direction, two @ direction

    def found(threshold: float, start: int, stop: int, scale: float = 1.0) -> tuple[float, float]:
        above = (round(scale * float((x[start:stop] > threshold).sum())) for x in (second, first))
        return bounds(*above, counted, confidence)

    # halfway between two normals of one spread their probabilities are told apart best
    halfway = float(first[:learnt].mean() + second[:learnt].mean()) / 2.0
    mu = gaussian_mu(*found(halfway, learnt, learnt + counted))
    tail = np.quantile(first[:learnt], 1.0 - np.geomspace(0.5, 0.005, TAILS))
    best = max(tail, key=lambda t: any_epsilon(*found(t, 0, learnt, counted / learnt), delta))
    return Audit(
        mu=mu,
        epsilon=float(gaussian_epsilon(delta, mu)) if mu > 0 else 0.0,
        epsilon_of_any=max(0.0, any_epsilon(*found(best, learnt, learnt + counted), delta)),
        delta=delta,
        trials=counted,
        confidence=confidence,
    )


def bounds(hits: int, false_alarms: int, trials: int, confidence: float) -> tuple[float, float]:
    """(lower bound of the hits' probability, upper bound of the false alarms'), together with `confidence`."""
    low, high = (binomtest(count, trials).proportion_ci(confidence, "exact") for count in (hits, false_alarms))
    return float(low.low), float(high.high)


def gaussian_mu(low: float, high: float) -> float:
    """Of two unit normals that an event of these probabilities tells apart (Dong, Roth & Su 2022)."""
    return float(ndtri(low) - ndtri(high)) if low > high else 0.0


def any_epsilon(low: float, high: float, delta: float) -> float:
    """Of any mechanism under which an event has these probabilities."""
    return math.log((low - delta) / high) if low > delta else -math.inf


def _discriminant(one: Outputs, two: Outputs) -> Outputs:
    apart = two.mean(0) - one.mean(0)
    spread = np.atleast_2d(np.cov(one, rowvar=False) + np.cov(two, rowvar=False)) / 2.0
    # a direction without noise must not be lost to the division by it
    floor = 1e-10 * float(np.trace(spread)) / len(apart)
    found: Outputs = np.linalg.solve(spread + floor * np.eye(len(apart)), apart)
    return found
