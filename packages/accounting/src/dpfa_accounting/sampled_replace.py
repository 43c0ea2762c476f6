"""A record that is replaced, in a sample: one loss distribution for both samplers and both directions.

With g the probability of being sampled, delta(epsilon) is at most H = sup of E_{e**epsilon}(g P + (1 - g) Q || Q) for
epsilon >= 0, P and Q the release's worst pair. Neighbours under replace come in both orders, so
delta(-epsilon) = 1 - e**-epsilon + e**-epsilon delta(epsilon), and the distribution at -epsilon is e**-epsilon times
that at epsilon. H is convex where both meet, because 2 H'(1) >= H(1) - 1; so it is the profile of some pair, and
it composes.

Sampling without replacement: Zhu, Dong & Wang 2022, Theorem 11. Poisson sampling: given who else was drawn, the
outputs are (1 - g) Z + g X and (1 - g) Z + g X', with X, X' and Z pairwise no further apart than two neighbours
under replace, because an absent record contributes 0, as some record could. Advanced joint convexity (Balle,
Barthe & Gaboardi 2018, Theorem 2) then gives the same profile.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from dpfa_core.events import FixedSizeSampled, Gaussian, Laplace, PoissonSampled

Values = NDArray[np.float64]

TAIL = 10.0
"""Standard deviations after which a Gaussian loss counts as infinite: 8e-24 of the mass."""


def share(event: PoissonSampled | FixedSizeSampled) -> float:
    """The probability that a record is in the sample, rounded up."""
    if isinstance(event, PoissonSampled):
        return event.sampling_probability
    return min(1.0, math.nextafter(event.sample_size / event.population, 1.0))


def delta(epsilon: Values, part: float, inner: Gaussian | Laplace) -> Values:
    """The profile at `epsilon` >= 0."""
    # e**epsilon = 1 + part (e**level - 1)
    level = np.where(
        epsilon < 30.0,
        np.log1p(np.expm1(np.minimum(epsilon, 30.0)) / part),
        epsilon - math.log(part) + np.log1p(-(1.0 - part) * np.exp(-epsilon)),
    )
    if isinstance(inner, Laplace):
        gap = np.minimum(0.0, (level - 1.0 / inner.noise_multiplier) / 2.0)
        return np.asarray(part * -np.expm1(gap))
    mu = 1.0 / inner.noise_multiplier
    found = ndtr(mu / 2.0 - level / mu) - np.exp(level + log_ndtr(-mu / 2.0 - level / mu))
    return np.asarray(part * np.maximum(0.0, found))


def largest_loss(part: float, inner: Gaussian | Laplace) -> float:
    """Beyond it there is no mass, or next to none."""
    mu = 1.0 / inner.noise_multiplier
    level = mu if isinstance(inner, Laplace) else mu * (mu / 2.0 + TAIL)
    return math.log1p(part * math.expm1(level)) if level < 30.0 else level + math.log(part + math.exp(-level))


def distribution(event: PoissonSampled | FixedSizeSampled, interval: float) -> privacy_loss_distribution:
    """The loss on a grid of `interval`, never below the true one (Doroshenko et al. 2022, connect the dots)."""
    inner, part = event.event, share(event)
    assert isinstance(inner, Gaussian | Laplace)  # noqa: S101
    top = max(1, math.ceil(largest_loss(part, inner) / interval))
    deltas = np.minimum.accumulate(delta(np.arange(top + 1, dtype=np.float64) * interval, part, inner))
    steps, growth = np.diff(deltas), math.expm1(interval)
    above = np.append((steps[1:] - steps[:-1] * math.exp(interval)) / growth, steps[-1] / math.expm1(-interval))
    above = np.maximum(0.0, above)
    below = above * np.exp(-interval * np.arange(1, top + 1))
    at_zero = max(0.0, 1.0 - float(above.sum() + below.sum() + deltas[-1]))
    masses = np.concatenate((below[::-1], [at_zero], above))
    grid = dict(zip(range(-top, top + 1), masses.tolist(), strict=True))
    return privacy_loss_distribution.PrivacyLossDistribution(
        pld_pmf.create_pmf(grid, interval, float(deltas[-1]), pessimistic_estimate=True)
    )
