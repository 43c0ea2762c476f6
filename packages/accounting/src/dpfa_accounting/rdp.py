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

from dpfa_accounting.composition import ComposingAccountant, Releases
from dpfa_accounting.translation import dp_event
from dpfa_core.events import (
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
)
from dpfa_core.spec import Reasons

Curve = NDArray[np.float64]

ORDERS = np.array(rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)

ORDER_ERROR = (1e-13 + 1e-14 * ORDERS) / (ORDERS - 1.0)
"""Above the float64 error of one release's curve, whose logarithms of sums are divided by order - 1."""


class RdpAccountant(ComposingAccountant):
    """Renyi divergences add up; order infinity is pure epsilon.

    Guarantee: tested (reference values; never below the exact Gaussian).
    Source: Mironov 2017; Mironov, Talwar & Zhang 2019 (Poisson); Wang, Balle & Kasiviswanathan 2019,
    Theorem 27 (fixed size); Bun & Steinke 2016, Proposition 3.3 (pure epsilon); Canonne, Kamath & Steinke
    2020, Proposition 12 (conversion).
    """

    name: ClassVar[str] = "rdp"
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]] = "upper"

    def _against(self, event: Event) -> Reasons:
        match event:
            case Gaussian() | Laplace() | Exponential() | EpsilonDelta(delta=0):
                return ()
            case EpsilonDelta():
                return ("RDP has no curve for an EpsilonDelta with delta > 0; use pld.",)
            case PoissonSampled(event=inner) | FixedSizeSampled(event=inner):
                if isinstance(inner, Gaussian):
                    return ()
                return (f"RDP of a sampled release is known around a Gaussian, got {type(inner).__name__}; use pld.",)
        return (f"RDP has no curve for {type(event).__name__}; use an accountant that prices it.",)

    def _epsilon(self, releases: Releases, delta: float) -> float:
        pure = math.fsum(count * _pure(event) for event, count in releases) * (1.0 + 2.0**-50)
        if delta == 0:
            return pure
        value, _ = rdp.rdp_privacy_accountant.compute_epsilon(ORDERS, _total(releases), delta)
        return min(pure, float(value) * (1.0 + 2.0**-40))

    def _delta(self, releases: Releases, epsilon: float) -> float:
        if epsilon >= math.fsum(count * _pure(event) for event, count in releases) * (1.0 + 2.0**-50):
            return 0.0
        value, _ = rdp.rdp_privacy_accountant.compute_delta(ORDERS, _total(releases), epsilon)
        return float(value) * (1.0 + 2.0**-40)


def _pure(event: Event) -> float:
    """Epsilon at delta = 0: the curve's value at order infinity."""
    match event:
        case Laplace(noise_multiplier):
            return 1.0 / noise_multiplier
        case Exponential(epsilon) | EpsilonDelta(epsilon):
            return epsilon
    return math.inf


def _total(releases: Releases) -> Curve:
    # float64 noise can push a tiny divergence below 0, which the library would read as no cost at all
    curves = [count * (np.maximum(_curve(event), 0.0) + ORDER_ERROR) for event, count in releases]
    return np.sum(curves, axis=0)  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _curve(event: Event) -> Curve:
    """Divergence of one release at each of ORDERS."""
    if isinstance(event, Exponential | EpsilonDelta):
        epsilon = _pure(event)
        return np.minimum(epsilon, ORDERS * epsilon**2 / 2.0)
    translated, relation = dp_event(event)
    with _quiet():
        return rdp.RdpAccountant(ORDERS, relation).compose(translated).rdp  # type: ignore[no-any-return]


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
