"""Privacy random variables, on prv-accountant: the upper end of its interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from prv_accountant import GaussianMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant
from prv_accountant.accountant import compute_safe_domain_size
from scipy.special import ndtr

from dpfa_accounting.composition import ComposingAccountant
from dpfa_accounting.reduction import Releases, described
from dpfa_accounting.round_off import LEAST_DELTA, delta_left, lost_mass
from dpfa_core.checks import positive
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import Event, Gaussian, PoissonSampled

DELTA_SHARE = 1e-3
"""The part of delta that the discretisation may use."""

GRID_POINTS = 2**20
"""Beyond these, seconds become minutes, and PLD is both faster and tighter."""


class _Removed(PoissonSubsampledGaussianMechanism):  # type: ignore[misc]
    """The loss when the record is the one taken away: the direction that the library holds."""

    def rdp(self, alpha: float) -> float:
        # only sizes the grid; the library's series for fractional orders need not end when q is large
        return float(super().rdp(alpha)) if float(alpha).is_integer() else math.inf


class _Added(_Removed):
    """The loss when the record is the one put in.

    With x ~ N(0, s**2) it is -log(1 - q + q exp((x - 1/2) / s**2)), bounded above by -log(1 - q).
    """

    def cdf(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        gap = np.exp(-np.asarray(t, dtype=np.longdouble)) - (1 - self.p)
        inside = gap > 0
        x = self.sigma**2 * np.log(np.where(inside, gap, self.p) / self.p) + 0.5
        return cast(NDArray[np.float64], np.where(inside, ndtr(np.double(-x / self.sigma)), 1.0))


class PrvAccountant(ComposingAccountant):
    """Numerical composition with an error bound; the answer is its upper end.

    Both directions of a sampled release are priced, and the larger counts.

    Guarantee: tested (never below the exact Gaussian or the estimates of another library).
    Args: `eps_error`: how far the upper end lies above the estimate.
    Source: Gopi, Lee & Wutschitz 2021, Theorem 5.5.
    """

    name: ClassVar[str] = "prv"
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]] = "interval"

    def __init__(self, *, eps_error: float = 0.01) -> None:
        super().__init__()
        positive("eps_error", eps_error)
        self._eps_error = eps_error

    def interval(self, delta: float) -> tuple[float, float]:
        """A lower and an upper bound on the least epsilon at `delta`.

        Raises: UnsupportedEvent where ``epsilon`` does, and for an account without events.
        """
        high = self.epsilon(delta)
        rest, slack, _ = self._priced()
        if slack or any(self.remarks(event) for event in self._counts):
            # priced by something dearer, which has no lower bound for the release itself
            return 0.0, high
        if not 0 < high < math.inf:
            return high, high
        return max(0.0, *self._ends(rest, delta, 0)), high

    def _against(self, event: Event) -> str:
        match event:
            case Gaussian() | PoissonSampled(event=Gaussian(), relation="add_or_remove"):
                return ""
            case PoissonSampled(event=Gaussian()):
                return (
                    "PRV prices Poisson sampling under add_or_remove, got relation='replace' "
                    "(doubling the sensitivity is no bound for sampled releases)"
                )
        return f"PRV prices Gaussian releases, whole or Poisson sampled, got {described(event)}"

    def _epsilon(self, releases: Releases, delta: float) -> float:
        return max(0.0, *self._ends(releases, delta, 2))

    def _ends(self, releases: Releases, delta: float, end: int) -> tuple[float, ...]:
        """Of (lower, estimate, upper), one for each direction."""
        left = delta_left(delta, releases, "PRV")
        return self._ask(releases, left, lambda prv, counts: prv.compute_epsilon(left, counts)[end])

    def _delta(self, releases: Releases, epsilon: float) -> float:
        highs = self._ask(releases, LEAST_DELTA, lambda prv, counts: prv.compute_delta(epsilon, counts)[2])
        return max(LEAST_DELTA, *highs) + lost_mass(releases)

    def _ask(self, releases: Releases, delta: float, question: Callable[[Any, list[int]], float]) -> tuple[float, ...]:
        """The library's answer for each direction."""
        counts = [count for _, count in releases]
        sampled = any(isinstance(event, PoissonSampled) for event, _ in releases)
        answers = []
        for direction in (_Removed, _Added) if sampled else (_Removed,):
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    library = _library(releases, direction, delta * DELTA_SHARE, self._eps_error)
                    answers.append(float(question(library, counts)))
            except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
                raise UnsupportedEvent(
                    f"PRV could not discretise these releases at delta = {delta:.3g} "
                    f"({type(error).__name__}: {error}); use pld or rdp."
                ) from error
        return tuple(answers)


class _Composition(PRVAccountant):  # type: ignore[misc]
    """Composed once, for any number of questions about it."""

    _composed: Any = None

    def compute_composition(self, num_self_compositions: list[int]) -> Any:
        if self._composed is None:
            self._composed = super().compute_composition(num_self_compositions)
        return self._composed


@lru_cache(maxsize=2)
def _library(releases: Releases, direction: type[_Removed], delta_error: float, eps_error: float) -> Any:
    """The library's accountant of `releases`, in one direction."""
    losses, counts = [_loss(event, direction) for event, _ in releases], [count for _, count in releases]
    errors = {"eps_error": eps_error, "delta_error": delta_error}
    half_width = compute_safe_domain_size(losses, counts, **errors)
    points = 2.0 * half_width / eps_error * math.sqrt(sum(counts) / 2 * math.log(12 / delta_error))
    if not points <= GRID_POINTS:
        raise ValueError(f"needs {points:.2g} grid points, more than {GRID_POINTS}")
    return _Composition(losses, max_self_compositions=counts, **errors)


def _loss(event: Event, direction: type[_Removed]) -> Any:
    match event:
        case PoissonSampled(probability, Gaussian(noise_multiplier)):
            return direction(sampling_probability=probability, noise_multiplier=noise_multiplier)
        case Gaussian(noise_multiplier):
            return GaussianMechanism(noise_multiplier=noise_multiplier)
    raise UnsupportedEvent(f"PRV has no loss for {event!r}; use rdp or pld.")
