"""The noise that is planned is 5 % smaller than the noise that was calibrated."""

from __future__ import annotations

from dataclasses import replace

from dpfa_core.spec import AttentionProblem, NoisePlan, Sensitivity
from dpfa_mechanisms.gaussian import Gaussian


class ShortGaussian(Gaussian):
    name = "short_gaussian"

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        plan = super().plan(sensitivity, noise_multipliers, problem)
        return replace(plan, head_scale=tuple(0.95 * scale for scale in plan.head_scale))
