"""The Gaussian mechanism, calibrated exactly (PRIVACY P4)."""

from __future__ import annotations

import math
from typing import Literal

from scipy.special import erfcx

from dpfa_core.checks import fraction, positive
from dpfa_core.events import Gaussian as GaussianEvent
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, Norm, PrivacySpec, Reasons, Sensitivity
from dpfa_mechanisms.planning import noise_plan, release_reasons

ERFCX_ERROR = 2.0**-44
"""Assumed relative error of ``scipy.special.erfcx``; measured against 60 digits: below 2**-45."""

CERTAIN = 20.0
"""A standard normal lies below this with a probability that rounds to 1."""

SMALLEST_NORMAL = 2.0**-1022


class Gaussian:
    """Independent Gaussian noise on every released number; ``noise_multiplier`` = std / l2 sensitivity."""

    contract_version = 1
    name = "gaussian"
    kind: Literal["additive", "selection"] = "additive"
    norm: Norm = "l2"

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against; empty means that ``calibrate`` and ``plan`` hold for this release."""
        reasons = release_reasons(spec, problem, self.norm)
        if spec.delta <= 0:
            reasons += (f"the Gaussian mechanism needs delta > 0, got {spec.delta}; use laplace for delta = 0.",)
        return reasons

    def calibrate(self, epsilon: float, delta: float) -> float:
        """The least noise multiplier of one release, rounded up.

        ``gaussian_delta`` at the result is at most `delta`.

        Guarantee: tested (against 50 digits, and by evaluating delta at the result).
        Args: epsilon > 0 and finite, 0 < delta < 1.
        Raises: PrivacyParameterError.
        Source: Balle & Wang 2018, Theorem 8.
        """
        positive("epsilon", epsilon, remedy="A release without noise has no noise multiplier.")
        fraction("delta", delta, zero=False, remedy="The Gaussian mechanism has no delta = 0.")
        low = high = 1.0
        while gaussian_delta(epsilon, high) > delta:
            low, high = high, high * 2.0
        while low == high or gaussian_delta(epsilon, low) <= delta:
            low, high = low / 2.0, low
        while (middle := (low + high) / 2.0) not in (low, high):
            if gaussian_delta(epsilon, middle) <= delta:
                high = middle
            else:
                low = middle
        return high

    def event(self, noise_multiplier: float) -> GaussianEvent:
        """The price of one release."""
        return GaussianEvent(noise_multiplier)

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Noise stds in output units, rounded up; see ``planning.noise_plan``."""
        return noise_plan(self.name, "gaussian", self.norm, sensitivity, noise_multipliers, problem)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Balle & Wang 2018, Theorem 8"),
            Claim("sensitivity", status="tested", source="PRIVACY P3"),
            Claim("noise_law", status="assumed", source="the backend's noise is Gaussian with the planned std"),
        )


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """An upper bound of the least delta of one Gaussian release at `epsilon`, rounded up.

    With mu = 1 / noise_multiplier and x = epsilon/mu - mu/2 it is Phi(-x) - e^epsilon Phi(-x - mu). Because
    e^epsilon phi(x + mu) = phi(x), both terms share one exponential, and only Mills ratios are subtracted:
    nothing under- or overflows before the result does.

    Guarantee: tested (against 50 digits).
    Args: epsilon >= 0, noise_multiplier > 0.
    Source: Balle & Wang 2018, Theorem 8.
    """
    mu = 1.0 / noise_multiplier
    x = epsilon / mu - mu / 2.0
    if x < -CERTAIN:
        return 1.0
    near, far = float(erfcx(x / math.sqrt(2.0))), float(erfcx((x + mu) / math.sqrt(2.0)))
    # the difference cancels when mu is small, so the error is a share of the terms, not of the result
    difference = near - far + ERFCX_ERROR * (near + far)
    # the square is a few units in the last place off; a smaller exponent covers that and the products
    bound = 0.5 * math.exp(2.0**-50 - x * x / 2.0 * (1.0 - 2.0**-50)) * difference
    return min(1.0, max(bound, SMALLEST_NORMAL))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The least epsilon of one Gaussian release at `delta`, rounded up; ``gaussian_delta`` there is at most `delta`.

    Guarantee: tested (inverse of the calibration).
    Args: noise_multiplier > 0, 0 < delta < 1.
    Returns: 0 where the noise hides the record at that delta; inf where no float is large enough.
    Raises: PrivacyParameterError.
    Source: Balle & Wang 2018, Theorem 8.
    """
    positive("noise_multiplier", noise_multiplier, remedy="Without noise epsilon is infinite.")
    fraction("delta", delta, zero=False, remedy="The Gaussian mechanism has no delta = 0.")
    if gaussian_delta(0.0, noise_multiplier) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, noise_multiplier) > delta:
        low, high = high, high * 2.0
        if math.isinf(high):
            return high
    while (middle := (low + high) / 2.0) not in (low, high):
        if gaussian_delta(middle, noise_multiplier) <= delta:
            high = middle
        else:
            low = middle
    return high
