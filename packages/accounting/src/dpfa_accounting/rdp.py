"""Renyi differential privacy, on dp-accounting."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from dp_accounting import rdp
from numpy.typing import NDArray

from dpfa_accounting import balls_in_bins, concentrated, randomized_response
from dpfa_accounting.composition import ComposingAccountant
from dpfa_accounting.reduction import Releases, described, linear
from dpfa_accounting.translation import dp_event
from dpfa_core.events import (
    BallsInBins,
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

Curve = NDArray[np.float64]

ORDERS = np.array(rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)

ORDER_ERROR = (1e-13 + 1e-14 * ORDERS) / (ORDERS - 1.0)
"""Above the float64 error of one release's curve, whose logarithms of sums are divided by order - 1."""

UP = 1.0 + 2.0**-40


class RdpAccountant(ComposingAccountant):
    """Renyi divergences add up; order infinity is pure epsilon.

    Where every divergence grows in proportion to the order, the best of all orders is taken, else the best of
    ``ORDERS``.

    Guarantee: tested (reference values; never below the exact Gaussian).
    Source: Mironov 2017; Mironov, Talwar & Zhang 2019 (Poisson); Wang, Balle & Kasiviswanathan 2019,
    Theorem 27 (fixed size); Canonne, Kamath & Steinke 2020, Theorem 4 (discrete Gaussian) and Proposition 12
    (conversion); Cesar & Rogers 2021, Lemma 3.2 (exponential mechanism); Bun & Steinke 2016, Proposition 3.3.
    """

    name: ClassVar[str] = "rdp"
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]] = "upper"

    def _against(self, event: Event) -> str:
        match event:
            case Gaussian() | DiscreteGaussian() | Laplace() | Exponential() | RandomizedResponse():
                return ""
            case EpsilonDelta(delta=0) | PoissonSampled(event=Gaussian(), relation="add_or_remove"):
                return ""
            case FixedSizeSampled(event=Gaussian(), relation="replace"):
                return ""
            case BallsInBins(event=Gaussian(), relation="add_or_remove"):
                return ""
            case PoissonSampled(relation="replace", event=Gaussian() | Laplace()):
                return (
                    "RDP prices Poisson sampling under add_or_remove, got relation='replace' "
                    "(doubling the sensitivity is no bound for sampled releases)"
                )
            case FixedSizeSampled(relation="add_or_remove"):
                return (
                    "fixed-size sampling is priced under replace, got relation='add_or_remove'; "
                    "state replace, or sample by Poisson"
                )
        return f"RDP has no curve for {described(event)}"

    def _remarks(self, event: Event) -> tuple[str, ...]:
        if isinstance(event, DiscreteGaussian):
            return ("DiscreteGaussian is priced as concentrated privacy; its exact losses depend on the grid.",)
        return ()

    def _epsilon(self, releases: Releases, delta: float) -> float:
        pure = math.fsum(count * _pure(event) for event, count in releases) * (1.0 + 2.0**-50)
        if delta == 0:
            return pure
        if all(linear(event) for event, _ in releases):
            return concentrated.epsilon(_rho(releases), delta)
        with np.errstate(all="ignore"):
            value, _ = rdp.rdp_privacy_accountant.compute_epsilon(ORDERS, _total(releases), delta)
        return min(pure, float(value) * UP)

    def _delta(self, releases: Releases, epsilon: float) -> float:
        if epsilon >= math.fsum(count * _pure(event) for event, count in releases) * (1.0 + 2.0**-50):
            return 0.0
        if all(linear(event) for event, _ in releases):
            return concentrated.delta(_rho(releases), epsilon)
        with np.errstate(all="ignore"):
            value, _ = rdp.rdp_privacy_accountant.compute_delta(ORDERS, _total(releases), epsilon)
        return float(value) * UP


def _rho(releases: Releases) -> float:
    """Divergence per order, rounded up."""
    total = math.fsum(
        count * (0.5 / event.noise_multiplier / event.noise_multiplier)
        for event, count in releases
        if isinstance(event, Gaussian | DiscreteGaussian)
    )
    return math.nextafter(total * (1.0 + 2.0**-50), math.inf)


def _pure(event: Event) -> float:
    """Epsilon at delta = 0: the curve's value at order infinity."""
    match event:
        case Laplace(noise_multiplier):
            return 1.0 / noise_multiplier
        case Exponential(epsilon) | EpsilonDelta(epsilon):
            return epsilon
        case RandomizedResponse():
            return randomized_response.epsilon(event)
    return math.inf


def _total(releases: Releases) -> Curve:
    # float64 noise can push a tiny divergence below 0, which the library would read as no cost at all
    curves = [count * (np.maximum(_curve(event), 0.0) + ORDER_ERROR) for event, count in releases]
    total = np.sum(curves, axis=0)
    return np.asarray(np.where(np.isnan(total), math.inf, total))


@lru_cache(maxsize=1024)
def _curve(event: Event) -> Curve:
    """Divergence of one release at each of ORDERS, infinite where it is not known."""
    with np.errstate(all="ignore"):
        try:
            found = _divergence(event)
        except (ArithmeticError, ValueError):
            return np.full_like(ORDERS, math.inf)
    return np.where(np.isnan(found), math.inf, found)


def _divergence(event: Event) -> Curve:
    match event:
        case Gaussian(noise_multiplier) | DiscreteGaussian(noise_multiplier):
            return _unsampled(noise_multiplier)
        case EpsilonDelta(epsilon):
            return pure_curve(epsilon)
        case Exponential(epsilon):
            # log ratios of the exponential mechanism lie in an interval of length epsilon
            return np.minimum(pure_curve(epsilon), ORDERS * (epsilon * epsilon / 8.0))
        case RandomizedResponse():
            return randomized_response.curve(event, ORDERS)
        case BallsInBins(bins, rounds, Gaussian(noise_multiplier)):
            return rounds * balls_in_bins.curve(noise_multiplier, bins, ORDERS)
        case PoissonSampled(event=Gaussian(noise_multiplier)) | FixedSizeSampled(event=Gaussian(noise_multiplier)):
            # a sample costs no more than the whole (quasi-convexity)
            return np.minimum(_library(event), _unsampled(noise_multiplier))
    return _library(event)


def _unsampled(noise_multiplier: float) -> Curve:
    return np.asarray(ORDERS * (0.5 / noise_multiplier / noise_multiplier))


def _library(event: Event) -> Curve:
    translated, relation = dp_event(event)
    with _quiet():
        return rdp.RdpAccountant(ORDERS, relation).compose(translated).rdp  # type: ignore[no-any-return]


def pure_curve(epsilon: float) -> Curve:
    """The largest divergence of any pure release: that of binary randomised response."""
    other = 1.0 / (1.0 + math.exp(min(epsilon, 700.0)))
    exact = randomized_response.divergence(epsilon, 1.0 - other, other, ORDERS)
    return np.asarray(np.minimum(epsilon, exact + ORDER_ERROR))


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns of each low order whose series does not converge; it leaves that order out."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
