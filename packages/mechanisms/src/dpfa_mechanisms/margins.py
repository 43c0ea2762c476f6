"""What errors of single rows add to a sensitivity, where a noise structure makes more of them (PRIVACY P5, P10)."""

from __future__ import annotations

import math

from dpfa_core.spec import AttentionProblem

STEP = 2.0**-24
"""Largest relative error of one float32 rounding."""


def two_errors(problem: AttentionProblem, row_error: float) -> float:
    """How much further apart two releases are if every row of both has an error of norm `row_error`.

    All rows and heads of the longest batch row count: no record reaches more of them.
    """
    rows = max((pair[0] for pair in problem.lengths), default=problem.q_len) * problem.q_heads
    return 2.0 * row_error * math.sqrt(rows)


def product_error(terms: int) -> float:
    """Relative error of a float32 dot product of `terms` terms, in any order of summation, its result rounded.

    Against the sum of the terms' absolute values.
    Source: Higham 2002, section 3.1.
    """
    return (terms + 1) * STEP / (1.0 - (terms + 1) * STEP)
