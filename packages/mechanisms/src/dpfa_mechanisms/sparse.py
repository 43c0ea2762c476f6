"""Gaussian noise on a public choice of columns; the others are written as zeros (PRIVACY P5)."""

from __future__ import annotations

import dataclasses

from dpfa_core.checks import fraction, integer, require
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, Sensitivity, Structure
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.margins import STEP, two_errors
from dpfa_mechanisms.planning import noise_plan
from dpfa_mechanisms.rounding import output_norm


class Sparse(Gaussian):
    """Release ``max(1, round((1 - sparsity) head_dim))`` columns, chosen by the public `seed`, with noise.

    The other columns are literal zeros: a column that were released without noise would have no privacy. With
    `rescale` the columns that are kept are multiplied by 1 / (1 - sparsity) before the noise is added, which
    makes their sum right in the mean over seeds; sensitivity and planned std grow by the same factor.

    Args: `sparsity` in [0, 1), the share of columns left out; `seed` >= 0.
    """

    name = "sparse"

    def __init__(self, *, sparsity: float = 0.9, rescale: bool = False, seed: int = 0) -> None:
        fraction("sparsity", sparsity, remedy="At least one column is kept.")
        require(isinstance(rescale, bool), "rescale must be True or False", rescale)
        integer("seed", seed, least=0)
        self.sparsity, self.rescale, self.seed = float(sparsity), rescale, seed

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Noise stds of the columns that are kept, in units of the rescaled output, rounded up."""
        value = sensitivity.value
        if self.rescale:
            value = rescaled(value, self.sparsity, problem)
        structure = Structure(
            kind="sparse",
            parameters=(
                ("sparsity", self.sparsity),
                ("kept", kept_columns(self.sparsity, problem.head_dim)),
                ("rescale", int(self.rescale)),
            ),
            seed=self.seed,
        )
        wide = dataclasses.replace(sensitivity, value=value)
        return noise_plan(self.name, "gaussian", self.norm, wide, noise_multipliers, problem, structure=structure)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Balle & Wang 2018, Theorem 8"),
            Claim("sensitivity", status="tested", source="PRIVACY P3, P5: rescaled with the output"),
            Claim("noise_law", status="assumed", source="the backend noises the kept columns and zeroes the others"),
        )


def kept_columns(sparsity: float, head_dim: int) -> int:
    """How many of `head_dim` columns are released: at least one."""
    return max(1, round((1.0 - sparsity) * head_dim))


def rescaled(value: float, sparsity: float, problem: AttentionProblem) -> float:
    """The sensitivity of an output multiplied by 1 / (1 - sparsity) in float32, if it was `value`."""
    factor = 1.0 / (1.0 - sparsity)
    # the factor is rounded once, alike for both neighbours; each product is rounded once more
    largest = factor * (1.0 + 2.0 * STEP)
    return value * largest + two_errors(problem, STEP * largest * output_norm(problem, "l2"))
