"""From a noise multiplier to the numbers a backend adds: shared by the additive mechanisms."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from dpfa_core.checks import integer, positive, require
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, PrivacySpec, Reasons, Sensitivity, Structure
from dpfa_mechanisms.sensitivity import reasons_against


def release_reasons(spec: PrivacySpec, problem: AttentionProblem, norm: Norm) -> Reasons:
    """Why an additive mechanism cannot keep `spec` for this release."""
    reasons = reasons_against(spec, problem, norm)
    if math.isinf(spec.epsilon):
        reasons += ("epsilon must be finite for a mechanism that adds noise, got inf; that is a call without one.",)
    if problem.dtype == "float64":
        reasons += ("a float64 output shows more bits than a 53-bit sampler fills, got float64; release in float32.",)
    return reasons


def noise_plan(
    mechanism: str,
    distribution: Literal["gaussian", "laplace", "discrete_gaussian"],
    norm: Norm,
    sensitivity: Sensitivity,
    noise_multipliers: tuple[float, ...],
    problem: AttentionProblem,
    *,
    structure: Structure | None = None,
    row_scale: tuple[float, ...] = (1.0,),
    grid: float = 0.0,
    noiseless_heads: bool = False,
) -> NoisePlan:
    """Scales in output units, each rounded up to a float32.

    One multiplier belongs to the whole output. With one for each query head, multiplier h is relative to
    the sensitivity of one head, and the releases of the heads compose.

    Args: `structure`, `row_scale` and `grid` go into the plan as they are. With `noiseless_heads` a multiplier
    of 0 leaves its head as it is, and the whole release has no finite epsilon.
    Raises: PrivacyParameterError for another number of multipliers or a sensitivity in another norm.
    """
    heads = problem.q_heads
    require(
        len(noise_multipliers) in (1, heads),
        f"noise_multipliers must hold 1 or {heads} numbers, one for each query head",
        noise_multipliers,
    )
    for multiplier in noise_multipliers:
        if not (noiseless_heads and multiplier == 0):
            positive("noise_multiplier", multiplier)
    require(sensitivity.norm == norm, f"{mechanism} needs a sensitivity in {norm}", sensitivity.norm)
    per_head = sensitivity.value
    if len(noise_multipliers) > 1:
        per_head /= heads if norm == "l1" else math.sqrt(heads)
    # 32 bits a pair suffice where the output has few bits; Laplace takes its 53-bit profile always
    narrow = problem.dtype in ("bfloat16", "float16")
    return NoisePlan(
        mechanism=mechanism,
        distribution=distribution,
        head_scale=tuple(_up(multiplier * per_head) if multiplier else 0.0 for multiplier in noise_multipliers),
        row_scale=row_scale,
        norm=norm,
        structure=structure,
        grid=grid,
        transform="bm32" if narrow and distribution == "gaussian" else "bm64",
        noiseless_heads=noiseless_heads,
    )


def block_spectrum(head_dim: int, block_size: int, condition: float) -> tuple[tuple[float, ...], ...]:
    """The eigenvalues of the public covariance of block-diagonal noise, block by block; the largest is 1.

    In a block they fall geometrically from 1 to 1 / condition; a block of one column has the eigenvalue 1.
    The last block has what is left of `head_dim`.

    Args: `block_size` columns >= 1, `condition` >= 1.
    Raises: PrivacyParameterError.
    Source: PRIVACY P5.
    """
    integer("head_dim", head_dim, least=1)
    integer("block_size", block_size, least=1)
    positive("condition", condition)
    require(condition >= 1, "condition must be at least 1", condition)
    widths = [min(block_size, head_dim - first) for first in range(0, head_dim, block_size)]
    return tuple(tuple(condition ** (-i / (width - 1)) if i else 1.0 for i in range(width)) for width in widths)


def _up(value: float) -> float:
    """A float32 that is not below `value`, so that no cast of a backend rounds it down."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
