"""The Laplace mechanism: a pure epsilon, over the reals (PRIVACY P4)."""

from __future__ import annotations

import math
from typing import Literal

from dpfa_core.checks import fraction, positive
from dpfa_core.events import Laplace as LaplaceEvent
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, Norm, PrivacySpec, Reasons, Sensitivity
from dpfa_mechanisms.planning import noise_plan, release_reasons


class Laplace:
    """Independent Laplace noise on every released number; ``noise_multiplier`` = b / l1 sensitivity."""

    contract_version = 1
    name = "laplace"
    kind: Literal["additive", "selection"] = "additive"
    norm: Norm = "l1"

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against; empty means that ``calibrate`` and ``plan`` hold for this release."""
        return release_reasons(spec, problem, self.norm)

    def calibrate(self, epsilon: float, delta: float) -> float:
        """The least noise multiplier of one release, rounded up: 1 / epsilon whatever `delta` is.

        Guarantee: tested. A sampler with a last value adds ``tails.laplace_tail`` to delta.
        Args: epsilon > 0 and finite, 0 <= delta < 1.
        Raises: PrivacyParameterError.
        Source: Dwork, McSherry, Nissim & Smith 2006.
        """
        positive("epsilon", epsilon, remedy="A release without noise has no noise multiplier.")
        fraction("delta", delta)
        return math.nextafter(1.0 / epsilon, math.inf)

    def event(self, noise_multiplier: float) -> LaplaceEvent:
        """The price of one release."""
        return LaplaceEvent(noise_multiplier)

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Laplace scales b in output units, rounded up; see ``planning.noise_plan``."""
        return noise_plan(self.name, "laplace", self.norm, sensitivity, noise_multipliers, problem)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Dwork, McSherry, Nissim & Smith 2006"),
            Claim("sensitivity", status="tested", source="PRIVACY P3"),
            Claim("noise_law", status="assumed", source="the backend's noise is Laplace with the planned scale"),
        )
