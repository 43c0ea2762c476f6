"""What floating point adds to a sensitivity.

Model of a kernel: clip factors come from an upper bound of the norm in float32; clipped values and softmax
weights may each be rounded once to the dtype; sums, logits and exponentials are float32, sums over keys in parts of
``SUMMED_KEYS``; the noise is added in float32 and what is rounded after it is post-processing. In a token release
every weight must be a function of its own key, that is, the exponential is taken of ``logit - logit_bound``.
"""

from __future__ import annotations

import math

from dpfa_core.contracts import SUMMED_KEYS
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, Norm

ROUNDOFF = {"float64": 2.0**-24, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of one rounding; float64 inputs may be computed in float32."""

SMALLEST = {"float64": 2.0**-126, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}
"""Largest absolute error of one rounding below the normal numbers: half a step, or a flush to zero."""

CLIP = 2.0**-22
"""Two float32 roundings: the factor, and its product with the row."""


def accumulation(keys: int) -> float:
    """Relative error of a weighted mean of `keys` rows in float32: numerator, denominator, division.

    With at most m additions on the way of a term, the numerator grows by (1 + u)**(m + 1) and the denominator
    shrinks by (1 - u)**m at most, u = 2**-24. m is below `keys` in one sum, and at most ``SUMMED_KEYS`` and the
    number of parts in a sum of sums.

    Guarantee: tested (sums that lose as much as they can, in either order).
    Source: Higham 2002, section 4.2.
    """
    parts = -(-keys // SUMMED_KEYS)
    return (min(keys, SUMMED_KEYS + parts) + 3) * 2.0**-23


def exponent_error(logit_bound: float) -> float:
    """Absolute error of ``logit - logit_bound`` and its exponential's logarithm, in float32."""
    return (logit_bound + 1.0) * 2.0**-20


def weight_error(problem: AttentionProblem) -> float:
    """Relative error of one softmax weight rounded to the dtype; below the normal numbers at most 1."""
    spread = 0.0 if problem.logit_bound is None else math.exp(min(2.0 * problem.logit_bound, 700.0))
    return ROUNDOFF[problem.dtype] + min(1.0, SMALLEST[problem.dtype] * max(problem.kv_len, spread))


def clipped_norm(problem: AttentionProblem, norm: Norm) -> float:
    """Largest norm of a row clipped in float32, with what the dtype may add below its normal numbers."""
    if problem.clip_norm is None:
        raise PrivacyParameterError("clip_norm must be a number to bound a row, got None; pass clip_norm.")
    width = problem.head_dim if norm == "l1" else math.sqrt(problem.head_dim)
    return problem.clip_norm * (1.0 + CLIP) + SMALLEST[problem.dtype] * width


def output_norm(problem: AttentionProblem, norm: Norm) -> float:
    """Largest norm of one computed output row, in output units.

    Guarantee: tested (random and extremal rows rounded to each dtype).
    """
    row = clipped_norm(problem, norm) * (1.0 + ROUNDOFF[problem.dtype])
    if problem.clip == "output":
        return row
    return row * (1.0 + weight_error(problem)) * (1.0 + accumulation(problem.kv_len))
