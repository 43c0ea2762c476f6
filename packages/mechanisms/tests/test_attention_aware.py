"""Uneven noise against sums over every row and token, a closed form, and other choices of weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.attention_aware import AttentionAware
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.noise_energy import noise_energy, plan_multiplier
from dpfa_mechanisms.row_scales import row_scales
from dpfa_mechanisms.sensitivity import row_bounds, sensitivity

Array = NDArray[np.float64]
Queries = Literal["public", "private"]
S = 12
MASK = np.packbits(np.random.default_rng(3).random((S, S)) < 0.4).tobytes()
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (3, 0)},
    "both_sides": {"window": (2, 1)},
    "cross": {"q_len": 5, "causal": True},
    "more_queries": {"q_len": 15, "causal": True},
    "varlen": {"batch": 4, "causal": True, "lengths": ((12, 12), (4, 9), (4, 9), (7, 3))},
    "packed": {"mask": MASK},
    "packed_causal": {"mask": MASK, "causal": True},
}
CASES = [
    pytest.param(shape, queries, id=f"{name}-{queries}")
    for name, shape in SHAPES.items()
    for queries in ("public", "private")
]


def problem(**more: Any) -> AttentionProblem:
    shape: dict[str, Any] = {"batch": 1, "q_len": S, "kv_len": S, "q_heads": 4, "kv_heads": 2, "head_dim": 8}
    return AttentionProblem(**shape | {"clip_norm": 1.5, "logit_bound": 1.0} | more)


def token(queries: Queries) -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries)


def moves(case: AttentionProblem, queries: Queries, batch_row: int) -> tuple[Array, NDArray[np.int64]]:
    """Squared moves (tokens, rows) of one head, and n_i, from the definition of who sees whom."""
    rows, keys = case.lengths[batch_row] if case.lengths else (case.q_len, case.kv_len)
    bits = None if case.mask is None else np.unpackbits(np.frombuffer(case.mask, np.uint8))
    left, right = case.window
    sees = np.zeros((rows, keys), dtype=bool)
    for i in range(rows):
        for j in range(keys):
            apart = j - (i + keys - rows)
            sees[i, j] = (
                not (case.causal and apart > 0)
                and not (left >= 0 and -apart > left)
                and not (right >= 0 and apart > right)
                and (bits is None or bits[i * case.kv_len + j] == 1)
            )
    n = sees.sum(axis=1)
    seen, own = row_bounds(case, "l2", queries)
    squares = np.zeros((keys + rows, rows))
    for i in range(rows):
        squares[:keys, i] = sees[i] * seen[n[i]] ** 2
        if queries == "private":
            mine = i + keys - rows
            squares[mine if mine >= 0 else keys + i, i] = own[n[i]] ** 2
    return squares, n


def batch_rows(case: AttentionProblem) -> range:
    return range(case.batch)


def spent(plan: Any, case: AttentionProblem, queries: Queries) -> float:
    """The largest sum over rows and heads of squared moves in units of their stds."""
    heads = np.broadcast_to(np.array(plan.head_scale), case.q_heads)
    worst = 0.0
    for row in batch_rows(case):
        squares, n = moves(case, queries, row)
        scale = np.array(plan.row_scale)[n]
        worst = max(worst, float((squares / scale**2).sum(axis=1).max(initial=0.0) * (heads**-2.0).sum()))
    return worst


@pytest.mark.parametrize(("shape", "queries"), CASES)
def test_no_token_moves_further_than_the_multiplier_says(shape: dict[str, Any], queries: Queries) -> None:
    case = problem(**shape)
    bound = sensitivity(token(queries), case, "l2")
    plan = AttentionAware().plan(bound, (2.0,), case)
    assert len(plan.row_scale) == case.kv_len + 1
    assert min(plan.row_scale) > 0
    assert 0.25 * (1 - 1e-5) < spent(plan, case, queries) <= 0.25
    assert plan_multiplier(plan, token(queries), case) == pytest.approx(2.0, rel=1e-5)
    each = (1.0, 2.0, 4.0, 0.7)
    plan = AttentionAware().plan(bound, each, case)
    allowed = sum(multiplier**-2 for multiplier in each)
    assert allowed * (1 - 1e-5) < spent(plan, case, queries) <= allowed


@pytest.mark.parametrize(("shape", "queries"), CASES)
def test_no_other_weights_need_less_noise(shape: dict[str, Any], queries: Queries) -> None:
    case = problem(**shape)
    found = row_scales(case, queries)
    assert found.gap < 1e-6
    parts = [moves(case, queries, row) for row in batch_rows(case)]

    def energy(scale: Array) -> float:
        loads = [float((squares / scale[n] ** 2).sum(axis=1).max()) for squares, n in parts]
        return max(loads) * sum(float((scale[n[n > 0]] ** 2).sum()) for _, n in parts)

    least = energy(np.array(found.row_scale))
    assert least <= energy(np.ones(case.kv_len + 1)) * (1 + 1e-6)
    rng = np.random.default_rng(0)
    for spread in np.geomspace(1e-4, 1.0, 60):
        other = np.array(found.row_scale) * np.exp(spread * rng.standard_normal(case.kv_len + 1))
        assert energy(other) >= least * (1 - 1e-6)


@pytest.mark.parametrize(
    "shape", [{}, {"causal": True}, {"q_len": 5, "causal": True}], ids=["dense", "causal", "cross"]
)
def test_public_queries_have_a_closed_form(shape: dict[str, Any]) -> None:
    """The first key is seen by all rows: std_i**2 = D_i H sum_k D_k / mu**2."""
    case = problem(**shape)
    plan = AttentionAware().plan(sensitivity(token("public"), case, "l2"), (2.0,), case)
    n = [case.kv_len if not case.causal else i + 1 + case.kv_len - case.q_len for i in range(case.q_len)]
    seen = row_bounds(case, "l2", "public")[0]
    bounds = np.array([seen[keys] for keys in n])
    expected = np.sqrt(bounds * case.q_heads * bounds.sum()) * 2.0
    found = plan.head_scale[0] * np.array(plan.row_scale)[n]
    assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(("shape", "queries"), CASES)
def test_the_whole_plan_never_has_more_energy_than_even_noise(shape: dict[str, Any], queries: Queries) -> None:
    case = problem(**shape)
    bound = sensitivity(token(queries), case, "l2")
    uneven, even = (mechanism.plan(bound, (2.0,), case) for mechanism in (AttentionAware(), Gaussian()))
    assert noise_energy(uneven, case) <= noise_energy(even, case) * (1 + 1e-6)


def test_causal_noise_falls_much() -> None:
    case = problem(q_len=1024, kv_len=1024, causal=True, logit_bound=0.5)
    bound = sensitivity(token("private"), case, "l2")
    uneven, even = (mechanism.plan(bound, (2.0,), case) for mechanism in (AttentionAware(), Gaussian()))
    assert noise_energy(uneven, case) < 0.2 * noise_energy(even, case)


def test_long_sequences_are_solved() -> None:
    found = row_scales(problem(q_len=16384, kv_len=16384, causal=True, logit_bound=2.0), "private")
    assert found.gap < 1e-4
    assert found.move > 0


def test_a_larger_sensitivity_makes_more_noise_and_a_smaller_one_is_not_believed() -> None:
    case = problem(causal=True)
    bound = sensitivity(token("private"), case, "l2")
    plan = AttentionAware().plan(bound, (2.0,), case)
    double = AttentionAware().plan(dataclasses.replace(bound, value=2 * bound.value), (2.0,), case)
    half = AttentionAware().plan(dataclasses.replace(bound, value=bound.value / 2), (2.0,), case)
    assert double.head_scale[0] == pytest.approx(2 * plan.head_scale[0], rel=1e-6)
    assert half == plan


def test_rows_that_see_nothing_and_problems_without_any() -> None:
    case = problem(q_len=15, causal=True)
    plan = AttentionAware().plan(sensitivity(token("private"), case, "l2"), (2.0,), case)
    assert 0 < plan.row_scale[0] < 1e-15
    blind = problem(lengths=((5, 0),))
    plan = AttentionAware().plan(sensitivity(token("private"), blind, "l2"), (2.0,), blind)
    assert set(plan.row_scale) == {1.0}
    assert math.isfinite(plan.head_scale[0])


def test_other_units_and_norms_are_refused() -> None:
    sequence = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
    (reason,) = AttentionAware().supports(sequence, problem())
    assert "unit=\"token\", got 'sequence'" in reason
    assert AttentionAware().supports(token("private"), problem()) == ()
    assert AttentionAware().supports(token("private"), problem(clip="output"))
    for bound in (sensitivity(sequence, problem(), "l2"), sensitivity(token("public"), problem(), "l1")):
        with pytest.raises(PrivacyParameterError):
            AttentionAware().plan(bound, (1.0,), problem())
    with pytest.raises(PrivacyParameterError, match="logit_bound"):
        AttentionAware().plan(sensitivity(token("public"), problem(), "l2"), (1.0,), problem(logit_bound=None))
