"""Gaussian noise in a public subspace: noise energy and random draws fall to rank / head_dim (PRIVACY P5)."""

from __future__ import annotations

import dataclasses
import math

from dpfa_core.checks import integer, require
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, PrivacySpec, Reasons, Sensitivity, Structure
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.margins import STEP, product_error, two_errors
from dpfa_mechanisms.planning import noise_plan
from dpfa_mechanisms.rounding import SMALLEST, output_norm


class LowRank(Gaussian):
    """Release ``A U^T`` with ``A = f U + Z``, where U has `rank` orthonormal columns made from the public `seed`.

    f stays in float32 until it is multiplied by U, and A is rounded before it is multiplied by U^T: then all
    that leaves is a function of noised numbers. The planned std is that of A. What f has outside the columns
    of U is lost.

    Args: `rank` >= 1 and at most head_dim; `seed` >= 0.
    """

    name = "low_rank"

    def __init__(self, *, rank: int = 16, seed: int = 0) -> None:
        integer("rank", rank, least=1)
        integer("seed", seed, least=0)
        self.rank, self.seed = rank, seed

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against; empty means that ``calibrate`` and ``plan`` hold for this release."""
        reasons = super().supports(spec, problem)
        if self.rank > problem.head_dim:
            reasons += (f"rank must be at most head_dim={problem.head_dim}, got {self.rank}; choose a smaller one.",)
        return reasons

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Stds of the numbers of A, rounded up, with the margin for computing ``f U``.

        Raises: PrivacyParameterError, also for a rank above head_dim.
        """
        require(self.rank <= problem.head_dim, f"rank must be at most head_dim={problem.head_dim}", self.rank)
        wide = dataclasses.replace(sensitivity, value=projected(sensitivity.value, self.rank, problem))
        structure = Structure(kind="low_rank", parameters=(("rank", self.rank),), seed=self.seed)
        return noise_plan(self.name, "gaussian", self.norm, wide, noise_multipliers, problem, structure=structure)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Balle & Wang 2018, Theorem 8"),
            Claim("sensitivity", status="tested", source="PRIVACY P3, P5: widened by the rounding of f U"),
            Claim("noise_law", status="assumed", source="the backend noises and rounds f U, then multiplies by U^T"),
        )


def projected(value: float, rank: int, problem: AttentionProblem) -> float:
    """The sensitivity of the computed ``f U``, if that of f is `value`; in output units.

    Guarantee: tested (rows projected in float32).
    Source: PRIVACY P5.
    """
    # Rounding U to float32 moves its columns by at most STEP each, so U stretches nothing by more than this;
    # as much again covers the float64 decomposition that U comes from.
    stretch = 1.0 + 2.0 * STEP * math.sqrt(rank)
    # A number of f U is off by a share of |f| . |u| <= ||f|| ||u|| for its column u; the row has `rank` of them.
    length = math.sqrt(rank) * stretch
    below = problem.head_dim * math.sqrt(rank) * SMALLEST["float32"]
    row_error = product_error(problem.head_dim) * output_norm(problem, "l2") * length + below
    return value * stretch + two_errors(problem, row_error)
