"""How loud planned noise is, beside equal noise at the naive bound."""

from __future__ import annotations

import dataclasses

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Sensitivity
from dpfa_mechanisms.noise_energy import isotropic_energy, noise_energy


def noise_power(plan: NoisePlan, problem: AttentionProblem) -> float | None:
    """Mean square of the noise over all output elements of a call, in output units squared.

    Returns: None for noise of which only its own mechanism knows the variance.
    """
    try:
        energy = noise_energy(plan, problem)
    except PrivacyParameterError:
        return None
    return energy / (problem.batch * problem.q_len * problem.q_heads * problem.head_dim)


def energy_saved(
    plan: NoisePlan, spec: PrivacySpec, problem: AttentionProblem, bound: Sensitivity, noise_multiplier: float
) -> float | None:
    """The share of noise energy that `plan` does without, against equal noise at the naive bound; at least 0.

    Laplace noise is compared with Laplace noise, all other with Gaussian noise of the same multiplier.
    Returns: None where the energy of `plan` is not known.
    """
    try:
        energy = noise_energy(plan, problem)
    except PrivacyParameterError:
        return None
    if plan.norm == "l1":
        scale = (noise_multiplier * bound.naive,)
        naive = noise_energy(dataclasses.replace(plan, structure=None, row_scale=(1.0,), head_scale=scale), problem)
    else:
        naive = isotropic_energy(spec, problem, noise_multiplier)
    # scales are rounded up to a float32, which is no loss of the plan
    return max(0.0, 1.0 - energy / naive) if naive else None
