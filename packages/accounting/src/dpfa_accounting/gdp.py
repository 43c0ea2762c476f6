"""Gaussian differential privacy: exact for any composition of Gaussian releases on the whole data."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from scipy.special import log_ndtr

from dpfa_accounting.composition import ComposingAccountant
from dpfa_accounting.reduction import Releases, described
from dpfa_core.events import Event, Gaussian

LOG_NDTR_ERROR = 2.0**-44
"""Assumed relative error of ``scipy.special.log_ndtr``; measured against 60 digits: below 2**-49."""


class GdpAccountant(ComposingAccountant):
    """mu**2 = sum of 1 / noise_multiplier**2.

    Guarantee: tested (against 60 digits; no valid bound of another accountant lies below).
    Source: Dong, Roth & Su 2022, Theorem 3.1 and Corollary 3.3; Balle & Wang 2018, Theorem 8.
    """

    name: ClassVar[str] = "gdp"
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]] = "exact"

    def _against(self, event: Event) -> str:
        if isinstance(event, Gaussian):
            return ""
        return (
            f"GDP is exact for Gaussian releases on the whole data, got {described(event)} "
            "(central-limit numbers for other releases are no bound)"
        )

    def _epsilon(self, releases: Releases, delta: float) -> float:
        mu = _mu(releases)
        if delta == 0:
            return math.inf
        if gdp_delta(0.0, mu) <= delta:
            return 0.0
        low, high = 0.0, 1.0
        while high < math.inf and gdp_delta(high, mu) > delta:
            low, high = high, 2.0 * high
        if high == math.inf:
            return math.inf
        while (middle := (low + high) / 2.0) not in (low, high):
            low, high = (low, middle) if gdp_delta(middle, mu) <= delta else (middle, high)
        return high

    def _delta(self, releases: Releases, epsilon: float) -> float:
        return gdp_delta(epsilon, _mu(releases))


def _mu(releases: Releases) -> float:
    # merging has left one Gaussian
    return 1.0 / min(event.noise_multiplier for event, _ in releases if isinstance(event, Gaussian))


def gdp_delta(epsilon: float, mu: float) -> float:
    """The delta of mu-GDP at `epsilon`, rounded up: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""
    if not mu / 2.0 - epsilon / mu < 1e150:
        return 1.0
    if mu / 2.0 - epsilon / mu < -1e150:
        return 0.0
    upper = float(log_ndtr(mu / 2.0 - epsilon / mu))
    lower = epsilon + float(log_ndtr(-mu / 2.0 - epsilon / mu))
    # a difference of two numbers: its error is a share of the larger one
    share = -math.expm1(min(0.0, lower - upper)) + LOG_NDTR_ERROR * (1.0 + abs(upper) + abs(lower) + 2.0 * epsilon)
    return min(1.0, math.exp(upper) * share)
