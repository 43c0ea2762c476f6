"""Gaussian noise with a public block-diagonal covariance, and a clip in the norm that it defines (PRIVACY P5)."""

from __future__ import annotations

import dataclasses
import math

from dpfa_core.checks import integer, is_real, require
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, Norm, Sensitivity, Structure
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.margins import STEP, product_error, two_errors
from dpfa_mechanisms.planning import noise_plan
from dpfa_mechanisms.rounding import CLIP, ROUNDOFF, SMALLEST, accumulation, clipped_norm

LARGEST_CONDITION = 2.0**16
"""Beyond this, float32 no longer holds a covariance and its inverse root well enough for the margins below."""


class BlockDiagonal(Gaussian):
    """Noise of covariance ``std**2 * Sigma``, with Sigma public and block-diagonal.

    In every block of `block_size` columns the eigenvalues of Sigma fall geometrically from 1 to 1 / condition
    (``planning.block_spectrum``) along axes turned at random by the public `seed`. Rows are clipped where
    ``|Sigma**(-1/2) x|`` exceeds clip_norm, and the sensitivity is in that norm: noise_multiplier = std / it.

    Args: `block_size` >= 1 columns, head_dim if that is smaller; `condition` in [1, 65536]; `seed` >= 0.
    """

    name = "block_diagonal"
    norm: Norm = "whitened_l2"

    def __init__(self, *, block_size: int = 32, condition: float = 4.0, seed: int = 0) -> None:
        integer("block_size", block_size, least=1)
        good = is_real(condition) and 1 <= condition <= LARGEST_CONDITION
        require(good, f"condition must be in [1, {LARGEST_CONDITION:g}]", condition)
        integer("seed", seed, least=0)
        self.block_size, self.condition, self.seed = block_size, float(condition), seed

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Stds along the axes with eigenvalue 1, in output units, rounded up, with the margin for roundings."""
        width = min(self.block_size, problem.head_dim)
        wide = dataclasses.replace(sensitivity, value=whitened(sensitivity.value, width, self.condition, problem))
        structure = Structure(
            kind="block_diagonal", parameters=(("block_size", width), ("condition", self.condition)), seed=self.seed
        )
        return noise_plan(self.name, "gaussian", self.norm, wide, noise_multipliers, problem, structure=structure)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Balle & Wang 2018, Theorem 8"),
            Claim("sensitivity", status="tested", source="PRIVACY P3, P5: in the whitened norm, roundings stretched"),
            Claim("noise_law", status="assumed", source="the backend's noise has the planned covariance"),
        )


def whitened(value: float, width: int, condition: float, problem: AttentionProblem) -> float:
    """A sensitivity in the whitened norm with its margin for floating point, if that of unit scales is in `value`.

    ``|x| <= |Sigma**(-1/2) x| <= sqrt(condition) |x|``. So a row within the clip is no longer in the plain norm
    than in the whitened one, but an error made number by number, which ``rounding`` bounds by a share of the
    row's plain length, can be sqrt(condition) times as long once it is whitened. Softmax weights and clip
    factors multiply whole rows: their errors are not stretched. What is left is:

    * a clipped value. Its product with the clip factor, its rounding to the dtype and what the dtype loses
      below its normal numbers belong to that value alone, so they only make it longer. Every term of
      ``sensitivity``, the sum's round-off among them, is a multiple of the longest value: `value` grows by
      the ratio of its two lengths.
    * the sum over the keys and the division, ``accumulation``: they depend on all keys, come in both datasets,
      and their excess is added.

    Guarantee: tested (extremal rows clipped, rounded and summed in each dtype).
    Source: PRIVACY P5, P10.
    """
    root = math.sqrt(condition)
    step = ROUNDOFF[problem.dtype]
    length = clipped_norm(problem, "l2")
    # The matrices of whitening and mixing are rounded to float32, and |f W| is computed in float32: each is off
    # by a share of the Frobenius norm of one block, where the rows of f fall into blocks as orthogonal parts.
    frobenius = root * math.sqrt(width)
    measured = (product_error(width) + STEP) * frobenius
    # (1 + root CLIP) (1 + root step), less what `length` and the factor (1 + step) inside `value` hold already
    longer = (root - 1.0) * (CLIP + step) + condition * CLIP * step + measured * (1.0 + root * (CLIP + step))
    below = (root - 1.0) * SMALLEST[problem.dtype] * math.sqrt(problem.head_dim) * (1.0 + root * step)
    growth = 1.0 + longer + below / length
    sums = two_errors(problem, (root - 1.0) * accumulation(problem.kv_len) * length * growth * (1.0 + root * step))
    # the narrowest direction of the computed mixing matrix may be this much too narrow
    return (value * growth + sums) * (1.0 + 2.0 * STEP * frobenius) / (1.0 - STEP * frobenius)
