"""From a noise multiplier to the numbers a backend adds: shared by the additive mechanisms."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from dpfa_core.checks import positive, require
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, PrivacySpec, Reasons, Sensitivity
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
    distribution: Literal["gaussian", "laplace"],
    norm: Norm,
    sensitivity: Sensitivity,
    noise_multipliers: tuple[float, ...],
    problem: AttentionProblem,
) -> NoisePlan:
    """Scales in output units, each rounded up to a float32.

    One multiplier belongs to the whole output. With one for each query head, multiplier h is relative to
    the sensitivity of one head, and the releases of the heads compose.

    Raises: PrivacyParameterError for another number of multipliers or a sensitivity in another norm.
    """
    heads = problem.q_heads
    require(
        len(noise_multipliers) in (1, heads),
        f"noise_multipliers must hold 1 or {heads} numbers, one for each query head",
        noise_multipliers,
    )
    for multiplier in noise_multipliers:
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
        head_scale=tuple(_up(multiplier * per_head) for multiplier in noise_multipliers),
        norm=norm,
        transform="bm32" if narrow and distribution == "gaussian" else "bm64",
    )


def _up(value: float) -> float:
    """A float32 that is not below `value`, so that no cast of a backend rounds it down."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
