"""Gaussian noise whose multiplier is rounded up to a power of two: the price tells little of the promise."""

from __future__ import annotations

import math

from dpfa_core.checks import fraction, positive, require
from dpfa_core.events import Gaussian
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, PrivacySpec, Reasons, Sensitivity


class PowerOfTwo:
    """Protects whole sequences; more noise than needed, never less."""

    contract_version = 1
    name = "power_of_two"
    kind = "additive"
    norm = "l2"

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        checks = {
            f"power_of_two protects whole sequences, got unit={spec.unit!r}.": spec.unit == "sequence",
            "power_of_two needs a clip_norm, got None.": problem.clip_norm is not None,
            f"power_of_two needs a finite epsilon, got {spec.epsilon}.": math.isfinite(spec.epsilon),
            f"power_of_two needs delta > 0, got {spec.delta}.": spec.delta > 0,
        }
        return tuple(reason for reason, fits in checks.items() if not fits)

    def calibrate(self, epsilon: float, delta: float) -> float:
        positive("epsilon", epsilon)
        fraction("delta", delta, zero=False)
        exponent = 0
        while self._delta(epsilon, 2.0**exponent) > delta:
            exponent += 1
        while self._delta(epsilon, 2.0 ** (exponent - 1)) <= delta:
            exponent -= 1
        return 2.0**exponent

    def event(self, noise_multiplier: float) -> Gaussian:
        return Gaussian(noise_multiplier)

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        require(sensitivity.norm == "l2", "power_of_two needs an l2 sensitivity", sensitivity.norm)
        count = len(noise_multipliers)
        require(count in (1, problem.q_heads), "one multiplier, or one for each head, is needed", noise_multipliers)
        for multiplier in noise_multipliers:
            positive("noise_multiplier", multiplier)
        share = sensitivity.value / math.sqrt(count)
        return NoisePlan(
            mechanism=self.name,
            distribution="gaussian",
            head_scale=tuple(multiplier * share * (1 + 2.0**-40) for multiplier in noise_multipliers),
            transform="bm64" if problem.dtype in ("float32", "float64") else "bm32",
        )

    def claims(self) -> tuple[Claim, ...]:
        return (Claim("calibration", source="Balle & Wang 2018, Theorem 8"), Claim("quiet_price"))

    @staticmethod
    def _delta(epsilon: float, multiplier: float) -> float:
        """From above: the second term, which is subtracted, is left a little smaller."""
        mu = 1 / multiplier
        near, far = (0.5 * math.erfc((epsilon / mu + side * mu / 2) / math.sqrt(2)) for side in (-1, 1))
        return near - (math.exp(epsilon) * far * (1 - 1e-12) if far else 0.0) + near * 1e-12
