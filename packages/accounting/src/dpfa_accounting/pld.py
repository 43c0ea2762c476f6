"""Privacy loss distributions, on dp-accounting, guarded where its FFT falls short (PRIVACY P8)."""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any, ClassVar, Literal

from dp_accounting.pld import common, privacy_loss_distribution

from dpfa_accounting.composition import ComposingAccountant, Releases
from dpfa_accounting.round_off import LEAST_DELTA, delta_left, lost_mass
from dpfa_core.checks import positive
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import EpsilonDelta, Event, Exponential, Gaussian, Laplace, PoissonSampled
from dpfa_core.spec import Reasons

GRID_POINTS = 2.0**22
"""A composed loss may spread over about this many grid points; a wider one gets a coarser grid."""


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

    def _against(self, event: Event) -> Reasons:
        match event:
            case Gaussian() | Laplace() | Exponential() | EpsilonDelta():
                return ()
            case PoissonSampled(event=Gaussian() | Laplace()):
                return ()
            case PoissonSampled(event=inner):
                return (f"PLD of a sampled release is known around Gaussian or Laplace, got {type(inner).__name__}.",)
        return (f"PLD has no loss distribution for {type(event).__name__}; use an accountant that prices it.",)

    def _epsilon(self, releases: Releases, delta: float) -> float:
        left = delta_left(delta, releases, "PLD")
        # above the rounding of the library's sums, measured at 3e-12 on ten Gaussians
        return float(self._composed(releases).get_epsilon_for_delta(left)) * (1.0 + 2.0**-36)

    def _delta(self, releases: Releases, epsilon: float) -> float:
        found = float(self._composed(releases).get_delta_for_epsilon(epsilon))
        return max(LEAST_DELTA, found + lost_mass(releases))

    def _composed(self, releases: Releases) -> Any:
        widest = max(1.0, _spread(releases) / GRID_POINTS / self._interval)
        # powers of two keep the cache warm while counts grow
        interval = self._interval * 2.0 ** math.ceil(math.log2(widest))
        parts = [_distribution(event, interval).self_compose(count) for event, count in releases]
        return reduce(lambda one, other: one.compose(other), parts)


def _spread(releases: Releases) -> float:
    """About the width of the composed loss: mean, 20 standard deviations, and one release's range."""
    means, ranges = 0.0, 0.0
    for event, count in releases:
        inner = event.event if isinstance(event, PoissonSampled) else event
        share = event.sampling_probability if isinstance(event, PoissonSampled) else 1.0
        if isinstance(inner, Gaussian):
            square = inner.noise_multiplier**-2.0
            # the divergence of order 2 is above the mean loss
            means += count * min(square, math.log1p(share**2 * math.expm1(min(square, 700.0))))
            ranges += square + 20.0 * math.sqrt(square)
        else:
            pure = 1.0 / inner.noise_multiplier if isinstance(inner, Laplace) else getattr(inner, "epsilon", 0.0)
            means += count * min(pure, pure**2)
            ranges += 2.0 * pure
    return means + 20.0 * math.sqrt(means) + ranges


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
        case PoissonSampled(probability, Gaussian(noise_multiplier)):
            return privacy_loss_distribution.from_gaussian_mechanism(
                noise_multiplier, value_discretization_interval=interval, sampling_prob=probability
            )
        case PoissonSampled(probability, Laplace(noise_multiplier)):
            return privacy_loss_distribution.from_laplace_mechanism(
                noise_multiplier, value_discretization_interval=interval, sampling_prob=probability
            )
        case Exponential(epsilon):
            parameters = common.DifferentialPrivacyParameters(epsilon, 0.0)
        case EpsilonDelta(epsilon, delta):
            parameters = common.DifferentialPrivacyParameters(epsilon, delta)
        case _:
            raise UnsupportedEvent(f"PLD has no loss distribution for {event!r}.")
    return privacy_loss_distribution.from_privacy_parameters(parameters, value_discretization_interval=interval)
