"""What it costs that sampled noise ends somewhere, for each kind of noise a plan can name (PRIVACY P10)."""

from __future__ import annotations

import dataclasses
import math

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Sensitivity
from dpfa_mechanisms.tails import gaussian_tail, laplace_tail, released_numbers, tail_radius

BITS = {"bm32": 32, "bm64": 53}
"""Random bits in the radius of each transform."""

LAPLACE_END = {"float32": 23.5, "float16": 33.2, "bfloat16": 35.3}
"""In Laplace scales: where the gaps between 53-bit magnitudes reach the rounding step of the output."""


def samplers(plan: NoisePlan, problem: AttentionProblem) -> tuple[NoisePlan, ...]:
    """The plan with each transform that may turn bits into its noise, quickest first.

    A float32 output shows more bits than a 32-bit radius fills, and a Laplace magnitude needs its 53 bits.
    """
    short = plan.distribution == "gaussian" and problem.dtype in ("bfloat16", "float16")
    longest = dataclasses.replace(plan, transform="bm64")
    return (plan, longest) if short and plan.transform == "bm32" else (longest,)


def cost_of_end(
    plan: NoisePlan, problem: AttentionProblem, sensitivity: Sensitivity, *, noise_multiplier: float, delta: float
) -> float:
    """The delta to set aside, if ideal noise of `noise_multiplier` has at most `delta`.

    With delta - cost for the ideal noise, the sampled noise keeps delta; and the costs of several releases
    add up.

    Guarantee: tested (against P10's formula; costs of many releases against the formula for all of them).
    Raises: PrivacyParameterError for noise whose end nobody has measured.
    Source: PRIVACY P10.
    """
    numbers, row = released_numbers(problem), row_share(plan, sensitivity)
    if plan.distribution == "gaussian":
        radius = tail_radius(problem.dtype, BITS[plan.transform])
        groups, beyond = numbers // 2, math.exp(-radius * radius / 2.0)
        # P10's majorant over the moves that one row can make: a row's share of the move has a share of the pairs
        part = math.floor(groups * row**2)
        if part < 1:
            row, part = 1.0, groups
        tail = gaussian_tail(noise_multiplier / row, numbers=2 * part, radius=radius) * groups / part
    elif plan.distribution == "laplace" and problem.dtype in LAPLACE_END:
        end = LAPLACE_END[problem.dtype]
        groups, beyond = numbers, math.exp(-end)
        # convex in the move: the worst record spends it in as few rows as it can
        tail = laplace_tail(noise_multiplier / row, end=end) / row
    else:
        raise PrivacyParameterError(
            f"the end of the noise sampler is known for gaussian and laplace noise in float32, bfloat16 and "
            f"float16, got {plan.distribution} in {problem.dtype}; choose one of these."
        )
    # on the support that neighbours share, both laws are scaled by what the cut took away; a delta is itself
    # rounded, and more than a cost far below it would show
    growth = math.expm1(-groups * math.log1p(-beyond)) + 2.0**-39
    return min(1.0, (delta * growth + tail) * (1.0 + 2.0**-40))


def row_share(plan: NoisePlan, sensitivity: Sensitivity) -> float:
    """The part of a record's whole move that one row of one head can make, at the most.

    The end of the noise costs much more where a record may spend all its move in one place.
    """
    if not even(plan) or not sensitivity.row_bound or not sensitivity.value:
        return 1.0
    return min(1.0, max(sensitivity.row_bound) / sensitivity.value)


def even(plan: NoisePlan) -> bool:
    """Every row of every head has the same noise."""
    return len(plan.head_scale) == len(plan.row_scale) == 1
