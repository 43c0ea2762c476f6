"""Privacy loss distributions, on dp-accounting, guarded where its FFT falls short (PRIVACY P8)."""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any, ClassVar, Literal

import numpy as np
from dp_accounting.pld import common, privacy_loss_distribution

from dpfa_accounting import randomized_response, sampled_replace
from dpfa_accounting.composition import ComposingAccountant
from dpfa_accounting.reduction import Releases, described
from dpfa_accounting.round_off import LEAST_DELTA, delta_left, lost_mass
from dpfa_core.checks import positive
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import (
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
    RandomizedResponse,
)

GRID_POINTS = 2.0**22
"""A composed loss may spread over about this many grid points; a wider one gets a coarser grid."""

COARSEST = 1.0
"""A grid so coarse that its answer would say nothing."""


class PldAccountant(ComposingAccountant):
    """Discretised privacy losses, rounded to the private side and convolved.

    Guarantee: tested (reference values; never below the exact Gaussian).
    Args: `value_discretization_interval` of the loss grid; small noise coarsens it, which only adds.
    Source: Koskela et al. 2020; Doroshenko et al. 2022 (connect the dots); Zhu, Dong & Wang 2022.
    """

    name: ClassVar[str] = "pld"
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]] = "upper"

    def __init__(self, *, value_discretization_interval: float = 1e-4) -> None:
        super().__init__()
        positive("value_discretization_interval", value_discretization_interval)
        self._interval = value_discretization_interval

    def _against(self, event: Event) -> str:
        match event:
            case Gaussian() | Laplace() | Exponential() | EpsilonDelta() | RandomizedResponse():
                return ""
            case PoissonSampled(event=Gaussian() | Laplace()):
                return ""
            case FixedSizeSampled(event=Gaussian() | Laplace(), relation="replace"):
                return ""
            case FixedSizeSampled(relation="add_or_remove"):
                return (
                    "fixed-size sampling is priced under replace, got relation='add_or_remove'; "
                    "state replace, or sample by Poisson"
                )
            case DiscreteGaussian():
                return (
                    "PLD has no loss distribution for DiscreteGaussian: its losses depend on the grid, "
                    "which the event does not hold"
                )
        return f"PLD has no loss distribution for {described(event)}"

    def _epsilon(self, releases: Releases, delta: float) -> float:
        left = delta_left(delta, releases, "PLD")
        with np.errstate(all="ignore"):
            # above the rounding of the library's sums, measured at 3e-12 on ten Gaussians
            return float(self._composed(releases).get_epsilon_for_delta(left)) * (1.0 + 2.0**-36)

    def _delta(self, releases: Releases, epsilon: float) -> float:
        with np.errstate(all="ignore"):
            found = float(self._composed(releases).get_delta_for_epsilon(epsilon))
        return max(LEAST_DELTA, found + lost_mass(releases))

    def _composed(self, releases: Releases) -> Any:
        spread = _spread(releases)
        if not spread / GRID_POINTS <= COARSEST:
            raise UnsupportedEvent(
                f"PLD must find the losses of these releases on a grid, got a spread of {spread:.3g}; "
                "use gdp or rdp, or add noise."
            )
        widest = max(1.0, spread / GRID_POINTS / self._interval)
        # powers of two keep the cache warm while counts grow
        interval = self._interval * 2.0 ** math.ceil(math.log2(widest))
        try:
            return _convolved(releases, interval)
        except (ArithmeticError, IndexError, ValueError) as error:
            raise UnsupportedEvent(
                f"PLD could not discretise these releases ({type(error).__name__}: {error}); use gdp or rdp."
            ) from error


def _spread(releases: Releases) -> float:
    """About the width of the composed loss: mean, 20 standard deviations, and one release's range."""
    means, ranges = 0.0, 0.0
    for event, count in releases:
        sampled = isinstance(event, PoissonSampled | FixedSizeSampled)
        inner = event.event if isinstance(event, PoissonSampled | FixedSizeSampled) else event
        share = sampled_replace.share(event) if isinstance(event, PoissonSampled | FixedSizeSampled) else 1.0
        if isinstance(inner, Gaussian):
            mu = 1.0 / inner.noise_multiplier
            square = mu * mu
            # the divergence of order 2 is above the mean loss
            mean = min(square, math.log1p(share**2 * math.expm1(min(square, 700.0)))) if sampled else square
            means += count * mean
            ranges += square + 20.0 * mu
        else:
            pure = _pure(inner)
            means += count * min(pure, pure * pure)
            ranges += 2.0 * pure
    return means + 20.0 * math.sqrt(means) + ranges


def _pure(event: Event) -> float:
    match event:
        case Laplace(noise_multiplier):
            return 1.0 / noise_multiplier
        case RandomizedResponse():
            return randomized_response.epsilon(event)
        case Exponential(epsilon) | EpsilonDelta(epsilon):
            return epsilon
    return 0.0


@lru_cache(maxsize=16)
def _convolved(releases: Releases, interval: float) -> Any:
    parts = [_distribution(event, interval).self_compose(count) for event, count in releases]
    return reduce(lambda one, other: one.compose(other), parts)


@lru_cache(maxsize=128)
def _distribution(event: Event, interval: float) -> Any:
    """The loss distribution of one release, both directions where they differ."""
    match event:
        case Gaussian(noise_multiplier):
            return privacy_loss_distribution.from_gaussian_mechanism(
                noise_multiplier, value_discretization_interval=interval
            )
        case Laplace(noise_multiplier):
            return privacy_loss_distribution.from_laplace_mechanism(
                noise_multiplier, value_discretization_interval=interval
            )
        case PoissonSampled(relation="replace") | FixedSizeSampled():
            return sampled_replace.distribution(event, interval)
        case PoissonSampled(probability, Gaussian(noise_multiplier)):
            return privacy_loss_distribution.from_gaussian_mechanism(
                noise_multiplier, value_discretization_interval=interval, sampling_prob=probability
            )
        case PoissonSampled(probability, Laplace(noise_multiplier)):
            return privacy_loss_distribution.from_laplace_mechanism(
                noise_multiplier, value_discretization_interval=interval, sampling_prob=probability
            )
        case RandomizedResponse(noise_parameter, num_buckets):
            return privacy_loss_distribution.from_randomized_response(
                noise_parameter, num_buckets, value_discretization_interval=interval
            )
        case Exponential(epsilon):
            parameters = common.DifferentialPrivacyParameters(epsilon, 0.0)
        case EpsilonDelta(epsilon, delta):
            parameters = common.DifferentialPrivacyParameters(epsilon, delta)
        case _:
            raise UnsupportedEvent(f"PLD has no loss distribution for {event!r}.")
    return privacy_loss_distribution.from_privacy_parameters(parameters, value_discretization_interval=interval)
