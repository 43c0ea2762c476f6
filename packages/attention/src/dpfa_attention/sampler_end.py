"""What it costs that sampled noise ends somewhere, for each kind of noise a plan can name (PRIVACY P10)."""

from __future__ import annotations

import dataclasses
import math

from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Sensitivity
from dpfa_mechanisms.tails import gaussian_tail, laplace_tail, released_numbers, tail_radius

BITS = {"bm32": 32, "bm64": 53}
"""Random bits in the radius of each transform."""

LAPLACE_END = {"float32": 23.5, "float16": 33.2, "bfloat16": 35.3}
"""In Laplace scales: where the gaps between 53-bit magnitudes reach the rounding step of the output."""

DISCRETE_END = 2.0**-66
"""For each number: what discrete Gaussian noise misses of its law, 2**-127, times 1 + exp(epsilon) up to epsilon 42."""

LEAST_DISCRETE = 0.25
"""With a smaller noise multiplier, one release could have an epsilon beyond that."""


HOPELESS = 1e-2
"""An end that costs so much comes from too little noise: no delta worth its name pays it."""


def samplers(plan: NoisePlan, problem: AttentionProblem) -> tuple[NoisePlan, ...]:
    """The plan with each transform that may turn bits into its noise, quickest first.

    A float32 output shows more bits than a 32-bit radius fills, and a Laplace magnitude needs its 53 bits.
    """
    short = plan.distribution == "gaussian" and shown_dtype(plan, problem) in ("bfloat16", "float16")
    longest = dataclasses.replace(plan, transform="bm64")
    return (plan, longest) if short and plan.transform == "bm32" else (longest,)


def cost_of_end(
    plan: NoisePlan, problem: AttentionProblem, sensitivity: Sensitivity, *, noise_multiplier: float, delta: float
) -> float:
    """The delta to set aside, if ideal noise of `noise_multiplier` has at most `delta`.

    With delta - cost for the ideal noise, the sampled noise keeps delta; and the costs of several releases
    add up. A structure is judged in the numbers that are drawn for it: the projected ones, or the axes on which
    its covariance is one; what is computed from them afterwards costs nothing more.

    Guarantee: tested (against P10's formula; costs of many releases against the formula for all of them).
    Raises: PrivacyParameterError for noise whose end nobody has measured.
    Source: PRIVACY P10.
    """
    columns = drawn_columns(plan, problem)
    numbers, row = released_numbers(dataclasses.replace(problem, head_dim=columns)), row_share(plan, sensitivity)
    if plan.distribution == "gaussian":
        radius = tail_radius(shown_dtype(plan, problem), BITS[plan.transform])
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
    elif plan.distribution == "discrete_gaussian" and problem.dtype in LAPLACE_END:
        require(
            noise_multiplier >= LEAST_DISCRETE,
            f"discrete gaussian noise must have a noise multiplier of {LEAST_DISCRETE} or more",
            noise_multiplier,
            "Lower epsilon.",
        )
        # the law is exact to 2**-127 for each number, and what lies beyond its 32 scales is far less
        return min(1.0, numbers * DISCRETE_END)
    else:
        raise PrivacyParameterError(
            f"the end of the noise sampler is known for gaussian, laplace and discrete_gaussian noise in float32, "
            f"bfloat16 and float16, got {plan.distribution} in {problem.dtype}; choose one of these."
        )
    # on the support that neighbours share, both laws are scaled by what the cut took away; a delta is itself
    # rounded, and more than a cost far below it would show
    growth = math.expm1(-groups * math.log1p(-beyond)) + 2.0**-39
    return min(1.0, (delta * growth + tail) * (1.0 + 2.0**-40))


def check_end(cost: float, delta: float, *, noise_multiplier: float, dtype: str, epsilon: float | None = None) -> None:
    """Refuse a delta that cannot pay the sampler's end, with the remedy that there is.

    Raises: PrivacyParameterError.
    """
    if cost < delta:
        return
    if cost < HOPELESS:
        raise PrivacyParameterError(
            f"delta must exceed {cost:.3g}, what the end of the noise sampler costs at this size in {dtype}, got "
            f"{delta:.3g}; raise delta or lower epsilon."
        )
    asked, remedy = "noise", "take more noise"
    if epsilon is not None:
        asked, remedy = f"epsilon={epsilon:.6g}, which asks for noise", "lower epsilon"
    raise PrivacyParameterError(
        f"noise must be wide enough that the end of its sampler hides in delta={delta:.3g}, got {asked} of "
        f"{noise_multiplier:.3g} times the sensitivity, whose end costs {cost:.3g} at this size in {dtype}; {remedy}, "
        "or give epsilon=inf for attention that is not private."
    )


def drawn_columns(plan: NoisePlan, problem: AttentionProblem) -> int:
    """Numbers drawn for one row of one head."""
    structure = plan.structure
    if structure is None or structure.kind == "block_diagonal":
        return problem.head_dim
    return int(dict(structure.parameters)["rank" if structure.kind == "low_rank" else "kept"])


def shown_dtype(plan: NoisePlan, problem: AttentionProblem) -> str:
    """How finely the output shows the numbers that were drawn.

    Where a structure mixes them, one of them shows in many outputs, which together may have more bits of it than
    a single one; none shows more than the float32 in which they are mixed.
    """
    mixed = plan.structure is not None and plan.structure.kind != "sparse"
    return "float32" if mixed and problem.dtype in ("bfloat16", "float16") else problem.dtype


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
