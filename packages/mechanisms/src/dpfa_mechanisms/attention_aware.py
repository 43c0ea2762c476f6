"""Gaussian noise that follows the visible keys: the least total noise for the privacy of tokens (PRIVACY P5)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from dpfa_core.checks import one_of, require
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, PrivacySpec, Reasons, Sensitivity
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.planning import noise_plan
from dpfa_mechanisms.row_scales import row_scales

ITEMS = {"P3.token.public": "public", "P3.token.private": "private"}


class AttentionAware(Gaussian):
    """Rows that see many keys move little when one token changes, and get less noise; unit "token" only.

    Every row has a std of its own, a public function of how many keys it sees. The std is chosen so that the
    moves of the worst token, each measured in its row's std, have the length 1 / noise_multiplier, and that
    no other choice adds less noise in all.
    """

    name = "attention_aware"

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against; empty means that ``calibrate`` and ``plan`` hold for this release."""
        reasons = super().supports(spec, problem)
        if spec.unit != "token":
            reasons += (
                f'attention_aware noise protects unit="token", got {spec.unit!r}; '
                "a whole sequence moves all its rows alike, so choose gaussian.",
            )
        return reasons

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Stds of every head and of every number of visible keys; the numbers of one row are alike.

        The moves of single rows are computed from `problem`; of `sensitivity` it matters for which queries it
        holds. One above that of a single call makes the noise grow in proportion, one below is not believed.

        Raises: PrivacyParameterError, also for a sensitivity of another unit.
        """
        one_of("the item of a sensitivity for attention_aware", sensitivity.item, ITEMS)
        require(
            problem.clip == "value" and problem.logit_bound is not None and problem.clip_norm is not None,
            'attention_aware noise needs clip="value", a clip_norm and a logit_bound',
            problem,
        )
        queries: Literal["public", "private"] = "public" if ITEMS[sensitivity.item] == "public" else "private"
        scales = row_scales(problem, queries)
        heads = math.sqrt(problem.q_heads)
        more = max(1.0, sensitivity.value / (scales.uniform * heads)) if scales.uniform > 0 else 1.0
        wide = dataclasses.replace(sensitivity, value=scales.move * heads * more * (1.0 + 2.0**-40))
        return noise_plan(
            self.name, "gaussian", self.norm, wide, noise_multipliers, problem, row_scale=scales.row_scale
        )

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Balle & Wang 2018, Theorem 8"),
            Claim("sensitivity", status="tested", source="PRIVACY P3, P5: moves in units of each row's std"),
            Claim("moves", status="tested", source="PRIVACY P5: the largest sum over rows of D_ij**2 / std_i**2"),
            Claim("noise_law", status="assumed", source="the backend's noise is Gaussian with the planned stds"),
        )
