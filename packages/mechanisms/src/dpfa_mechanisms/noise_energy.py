"""What a plan adds to an output: its energy, its number of random draws, and the promise it really keeps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import numpy as np

from dpfa_core.checks import positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Structure
from dpfa_core.visibility import lengths
from dpfa_mechanisms.planning import block_spectrum
from dpfa_mechanisms.sensitivity import SUM_MARGIN, different_rows, row_bounds, sensitivity, worst_token
from dpfa_mechanisms.tails import released_numbers
from dpfa_mechanisms.visible import Floats, Visible

PER_NUMBER = {"none": 0.0, "gaussian": 1.0, "laplace": 2.0, "discrete_gaussian": 1.0}
"""Variance of one number in squared scales; a discrete Gaussian has at most its scale squared."""


def noise_energy(plan: NoisePlan, problem: AttentionProblem) -> float:
    """The expected sum of squared noise over all released numbers of one call, in squared output units.

    All batch rows up to their lengths count, with all heads and columns; for discrete Gaussian noise it is an
    upper bound. Columns that a structure leaves without noise add nothing, whatever error they have.

    Guarantee: tested (against sums over rows, heads and columns; discrete noise by exact sums).
    Raises: PrivacyParameterError for a plan that does not fit the problem, or noise of unknown variance.
    Source: PRIVACY P5.
    """
    if plan.distribution not in PER_NUMBER:
        raise PrivacyParameterError(
            f"the energy of noise is known for {', '.join(PER_NUMBER)}, got {plan.distribution!r}; "
            "choose one of these distributions."
        )
    columns = _trace(plan.structure, problem.head_dim) * PER_NUMBER[plan.distribution]
    rows = sum(many * float((scales**2).sum()) for many, scales in _row_scales(plan, problem))
    return rows * columns * float((_head_scales(plan, problem) ** 2).sum())


def isotropic_energy(spec: PrivacySpec, problem: AttentionProblem, noise_multiplier: float) -> float:
    """What the same promise costs with equal Gaussian noise at the naive bound: the number to compare with.

    The naive bound is ``Sensitivity.naive``, 2 clip_norm sqrt(R): all rows move by their whole diameter.
    """
    positive("noise_multiplier", noise_multiplier)
    scale = noise_multiplier * sensitivity(spec, problem, "l2").naive
    return noise_energy(NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(scale,)), problem)


def saving(plan: NoisePlan, spec: PrivacySpec, problem: AttentionProblem, noise_multiplier: float) -> float:
    """The share of the isotropic energy that `plan` does without; negative where it needs more.

    Args: `noise_multiplier` of a Gaussian release that keeps the same promise as `plan`.
    """
    isotropic = isotropic_energy(spec, problem, noise_multiplier)
    return 1.0 - noise_energy(plan, problem) / isotropic if isotropic > 0 else 0.0


def draws(plan: NoisePlan, problem: AttentionProblem) -> int:
    """How many random numbers reach the output of one call; a generator that makes pairs may draw a few more."""
    if plan.distribution == "none":
        return 0
    noisy = int(np.count_nonzero(_head_scales(plan, problem)))
    rows = sum(lengths(problem, row)[0] for row in range(problem.batch))
    return rows * noisy * _drawn_columns(plan.structure, problem.head_dim)


def plan_multiplier(plan: NoisePlan, spec: PrivacySpec, problem: AttentionProblem) -> float:
    """The noise multiplier that a plan has, from its scales and the bounds of single rows; rounded down.

    Each row of each head is divided by its own noise before the moves of the worst record are added up, so
    that uneven plans are judged by what they are. 0 where a record moves something that has no noise. What a
    structure itself rounds is not counted: its mechanism plans more noise for it.

    Guarantee: tested (equal to the planned multiplier for even noise; against the brute-force sum).
    Raises: PrivacyParameterError for noise that is not Gaussian, on the reals or a grid, or Laplace.
    Source: PRIVACY P3, P5.
    """
    require(
        plan.distribution in ("gaussian", "laplace", "discrete_gaussian"),
        'a plan has a noise multiplier if its distribution is "gaussian", "laplace" or "discrete_gaussian"',
        plan.distribution,
    )
    require(
        (plan.norm == "l1") == (plan.distribution == "laplace"),
        f"{plan.distribution} noise must belong to a clip in {'l1' if plan.distribution == 'laplace' else 'l2'}",
        plan.norm,
    )
    _row_scales_fit(plan, problem)
    heads = _head_scales(plan, problem)
    power = 1 if plan.norm == "l1" else 2
    if spec.unit == "sequence":
        seen = own = np.array(sensitivity(spec, problem, plan.norm).row_bound)
    else:
        sensitivity(spec, problem, plan.norm)  # refuses what has no bound
        queries: Literal["public", "private"] = "public" if spec.queries == "public" else "private"
        seen, own = (np.array(bounds) for bounds in row_bounds(problem, plan.norm, queries))
    occurs = np.zeros(problem.kv_len + 1, dtype=bool)
    for batch_row in different_rows(problem):
        occurs[Visible.of(problem, batch_row).counts] = True
    moved = occurs & ((seen > 0) | (own > 0))
    if not moved.any():
        return math.inf
    scales = np.broadcast_to(np.array(plan.row_scale), occurs.shape)
    if not heads.all() or not scales[moved].all():
        return 0.0
    inverse = np.where(moved, 1.0 / np.where(moved, scales, 1.0), 0.0)
    seen, own = (seen * inverse) ** power, (own * inverse) ** power
    if spec.unit == "sequence":
        load = max(float(seen[Visible.of(problem, row).counts].sum()) for row in different_rows(problem))
    else:
        load = worst_token(problem, seen, own, queries).load
    move = (load * float((heads**-power).sum())) ** (1.0 / power) * _stretch(plan)
    if plan.distribution == "discrete_gaussian":
        # rounding to the grid moves each number once more
        move += plan.grid * math.sqrt(released_numbers(problem)) / float(heads.min() * scales[moved].min())
    return float(1.0 / (move * SUM_MARGIN))


def _head_scales(plan: NoisePlan, problem: AttentionProblem) -> Floats:
    known = len(plan.head_scale) in (1, problem.q_heads)
    require(known, f"head_scale must hold 1 or {problem.q_heads} numbers", len(plan.head_scale))
    return np.broadcast_to(np.array(plan.head_scale, dtype=np.float64), (problem.q_heads,))


def _row_scales(plan: NoisePlan, problem: AttentionProblem) -> list[tuple[int, Floats]]:
    """(how many batch rows are alike, row_scale of each of their query rows)."""
    _row_scales_fit(plan, problem)
    alike = Counter(lengths(problem, row) for row in range(problem.batch))
    by_keys = np.broadcast_to(np.array(plan.row_scale, dtype=np.float64), (problem.kv_len + 1,))
    return [(alike[lengths(problem, row)], by_keys[Visible.of(problem, row).counts]) for row in different_rows(problem)]


def _row_scales_fit(plan: NoisePlan, problem: AttentionProblem) -> None:
    known = len(plan.row_scale) in (1, problem.kv_len + 1)
    require(known, f"row_scale must hold 1 or {problem.kv_len + 1} numbers", len(plan.row_scale))


def _parameter(structure: Structure, name: str) -> float:
    parameters = dict(structure.parameters)
    require(name in parameters, f"{structure.kind} noise needs the parameter {name!r}", structure.parameters)
    return parameters[name]


def _drawn_columns(structure: Structure | None, head_dim: int) -> int:
    """Random numbers for one row of one head."""
    if structure is None or structure.kind == "block_diagonal":
        return head_dim
    return _columns(structure, "rank" if structure.kind == "low_rank" else "kept", head_dim)


def _columns(structure: Structure, name: str, head_dim: int) -> int:
    number = _parameter(structure, name)
    whole = number == int(number) and 1 <= number <= head_dim
    require(whole, f"{name} must be an integer from 1 to {head_dim}", number)
    return int(number)


def _trace(structure: Structure | None, head_dim: int) -> float:
    """Energy of one row of one head in squared scales."""
    if structure is None or structure.kind != "block_diagonal":
        return float(_drawn_columns(structure, head_dim))
    return sum(sum(block) for block in _spectrum(structure, head_dim))


def _spectrum(structure: Structure, head_dim: int) -> tuple[tuple[float, ...], ...]:
    return block_spectrum(head_dim, _columns(structure, "block_size", head_dim), _parameter(structure, "condition"))


def _stretch(plan: NoisePlan) -> float:
    """How much further a structure lets a record move, measured in its noise, than in the clip's own norm."""
    structure = plan.structure
    if structure is None:
        return 1.0
    if structure.kind == "sparse" and _parameter(structure, "rescale"):
        return 1.0 / (1.0 - _parameter(structure, "sparsity"))
    if structure.kind == "block_diagonal" and plan.norm != "whitened_l2":
        return math.sqrt(_parameter(structure, "condition"))
    return 1.0
