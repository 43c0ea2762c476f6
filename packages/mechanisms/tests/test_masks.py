"""Token sensitivities under all masks together: against loops over bits, and records really replaced."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_core.visibility import lengths
from dpfa_mechanisms.sensitivity import heaviest_token, max_weight, own_row_factor, row_bounds, sensitivity
from dpfa_mechanisms.visible import Visible

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def spec(queries: str) -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries)  # type: ignore[arg-type]


def masked(mask: Mask, **more: Any) -> AttentionProblem:
    rows, keys = mask.shape
    shape = {"batch": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 2, "clip_norm": 1.0, "logit_bound": 1.0}
    return AttentionProblem(q_len=rows, kv_len=keys, mask=np.packbits(mask).tobytes(), **(shape | more))


def sees(problem: AttentionProblem, batch_row: int, i: int, j: int) -> bool:
    """From the definition, one bit at a time: row-major, the most significant bit of each byte first."""
    rows, keys = problem.lengths[batch_row] if problem.lengths else (problem.q_len, problem.kv_len)
    if i >= rows or j >= keys:
        return False
    place = i * problem.kv_len + j
    bit = True if problem.mask is None else bool(problem.mask[place // 8] >> (7 - place % 8) & 1)
    diagonal = i + keys - rows
    left, right = problem.window
    return (
        bit
        and not (problem.causal and j > diagonal)
        and not (left >= 0 and j < diagonal - left)
        and not (right >= 0 and j > diagonal + right)
    )


def matrix(problem: AttentionProblem, batch_row: int = 0) -> Mask:
    rows, keys = lengths(problem, batch_row)
    seen = [[sees(problem, batch_row, i, j) for j in range(keys)] for i in range(rows)]
    return np.array(seen, dtype=bool).reshape(rows, keys)


@st.composite
def problems(draw: st.DrawFn) -> AttentionProblem:
    rows, keys = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys))
    batch = draw(st.integers(1, 2))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    pairs = st.tuples(st.integers(0, rows), st.integers(0, keys))
    problem = masked(
        np.array(bits).reshape(rows, keys),
        batch=batch,
        lengths=draw(st.sampled_from([(), tuple(draw(pairs) for _ in range(batch))])),
        causal=draw(st.booleans()),
        window=(draw(st.integers(-1, 3)), draw(st.integers(-1, 3))),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        clip_norm=draw(st.sampled_from([0.25, 1.0, 7.0])),
        logit_bound=draw(st.sampled_from([0.5, 1.0, 3.0])),
    )
    # the same laws hold where ranges say it all
    return dataclasses.replace(problem, mask=None) if draw(st.integers(0, 3)) == 0 else problem


@settings(max_examples=150, deadline=None)
@given(problems())
def test_arrays_say_who_sees_whom_bit_by_bit(problem: AttentionProblem) -> None:
    for batch_row in range(problem.batch):
        expected, visible = matrix(problem, batch_row), Visible.of(problem, batch_row)
        rows, keys = expected.shape
        assert visible.counts.tolist() == expected.sum(axis=1).tolist()
        down, across = np.arange(1.0, rows + 1), np.arange(1.0, keys + 1)
        assert np.allclose(visible.over_rows(down), down @ expected)
        assert np.allclose(visible.over_keys(across), expected @ across)
        own = [i + keys - rows for i in range(rows)]
        assert visible.own_key.tolist() == own
        assert visible.sees_itself.tolist() == [j >= 0 and bool(expected[i, j]) for i, j in enumerate(own)]


def worst_by_loops(problem: AttentionProblem, queries: str, power: int) -> float:
    """P3's sums over every record of every batch row, without the margin for floating point."""
    bound, clip = problem.logit_bound or 0.0, 2 * (problem.clip_norm or 0.0)
    worst = 0.0
    for batch_row in range(problem.batch):
        seen = matrix(problem, batch_row)
        rows, keys = seen.shape
        shift = keys - rows
        for record in range(min(0, shift), keys):
            load = 0.0
            for i in range(rows):
                n = int(seen[i].sum())
                if queries == "private" and i == record - shift:
                    load += (clip * own_row_factor(n, bound)) ** power
                elif record >= 0 and seen[i, record]:
                    load += (clip * max_weight(n, bound)) ** power
            worst = max(worst, load)
    return float((problem.q_heads * worst) ** (1 / power))


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from(["public", "private"]), st.sampled_from(["l1", "l2"]))
def test_bound_is_the_sum_over_rows_of_the_worst_record(problem: AttentionProblem, queries: str, norm: Any) -> None:
    expected = worst_by_loops(problem, queries, 1 if norm == "l1" else 2)
    bound = sensitivity(spec(queries), problem, norm)
    assert expected <= bound.value <= expected * (1 + 1e-4)
    assert bound.value <= bound.naive * (1 + 1e-9)
    power = 1 if norm == "l1" else 2
    seen, own = (np.array(x) ** power for x in row_bounds(problem, norm, queries))  # type: ignore[arg-type]
    # without a word about the queries the bound may only be larger
    assert heaviest_token(problem, seen, own)[0] >= heaviest_token(problem, seen, own, queries)[0]  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_a_mask_that_repeats_the_shape_changes_nothing(problem: AttentionProblem) -> None:
    """Ranges and matrices are two ways to the same sums."""
    everything = np.ones((problem.q_len, problem.kv_len), dtype=bool)
    full = dataclasses.replace(problem, mask=np.packbits(everything).tobytes())
    bare = dataclasses.replace(problem, mask=None)
    for queries in ("public", "private"):
        with_mask, without = sensitivity(spec(queries), full), sensitivity(spec(queries), bare)
        assert with_mask.value == pytest.approx(without.value, rel=1e-12)
        assert with_mask.worst_key == without.worst_key


def attention(problem: AttentionProblem, seen: Mask, q: Array, k: Array, v: Array, order: int) -> Array:
    group = problem.q_heads // problem.kv_heads
    v = v * np.minimum(
        1.0, (problem.clip_norm or 0.0) / np.linalg.norm(v, ord=order, axis=-1, keepdims=True).clip(1e-300)
    )
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    bound = problem.logit_bound or 0.0
    weights = np.exp(bound * np.tanh(np.einsum("ihd,jhd->hij", q, k) / bound)) * seen
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("hij,jhd->ihd", weights, v)


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from(["public", "private"]), st.sampled_from([1, 2]), st.integers(0, 2**32 - 1))
def test_replaced_tokens_never_move_a_masked_output_beyond_the_bound(
    problem: AttentionProblem, queries: str, order: int, seed: int
) -> None:
    bound = sensitivity(spec(queries), problem, "l1" if order == 1 else "l2")
    rng = np.random.default_rng(seed)
    for batch_row in range(problem.batch):
        seen = matrix(problem, batch_row)
        rows, keys = seen.shape
        shift = keys - rows
        counts = seen.sum(axis=1)
        for record in range(min(0, shift) if queries == "private" else 0, keys):
            for size in (1.0, 30.0):
                q = rng.standard_normal((rows, problem.q_heads, 2)) * size
                k = rng.standard_normal((keys, problem.kv_heads, 2)) * size
                v = rng.standard_normal((keys, problem.kv_heads, 2)) * 50
                q2, k2, v2 = q.copy(), k.copy(), v.copy()
                if record >= 0:
                    k2[record] *= -1
                    v2[record] *= -1
                if queries == "private" and 0 <= record - shift < rows:
                    q2[record - shift] *= -1
                move = attention(problem, seen, q, k, v, order) - attention(problem, seen, q2, k2, v2, order)
                assert np.linalg.norm(move.ravel(), ord=order) <= bound.value
                single = np.linalg.norm(move, ord=order, axis=-1).max(axis=1, initial=0.0)
                assert np.all(single <= np.array(bound.row_bound)[counts])


def ascended(problem: AttentionProblem, queries: str, *, seed: int, turns: int) -> float:
    """Hill climbing on the raw tensors and on which record changes: it knows neither the proof nor the worst key."""
    seen = matrix(problem)
    rows, keys = seen.shape
    rng = np.random.default_rng(seed)
    best = 0.0
    for record in range(keys):
        own = record - (keys - rows)
        state = [rng.standard_normal((n, 1, 2)) * 3 for n in (rows, keys, keys)] + [rng.standard_normal((3, 2)) * 3]
        value, step = 0.0, 3.0
        for _ in range(turns):
            trial = [x + step * rng.standard_normal(x.shape) * (rng.random(x.shape) < 0.2) for x in state]
            q, k, v, new = trial
            q2, k2, v2 = q.copy(), k.copy(), v.copy()
            k2[record, 0], v2[record, 0] = new[0], new[1]
            if queries == "private" and 0 <= own < rows:
                q2[own, 0] = new[2]
            move = attention(problem, seen, q, k, v, 2) - attention(problem, seen, q2, k2, v2, 2)
            reached = float(np.linalg.norm(move))
            if reached > value:
                value, state = reached, trial
            step *= 1.0005
        best = max(best, value)
    return best


BLOCKED = np.kron(np.eye(2, dtype=bool), np.ones((2, 2), dtype=bool))
STAIRS = np.tril(np.ones((4, 4), dtype=bool)) | np.eye(4, k=1, dtype=bool)
HOLES = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=bool)


@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize(("mask", "share"), [(BLOCKED, 0.97), (STAIRS, 0.95), (HOLES, 0.95)])
def test_ascent_comes_close_to_the_bound_and_never_beyond(mask: Mask, share: float, queries: str) -> None:
    problem = masked(mask)
    limit = sensitivity(spec(queries), problem).value
    assert share * limit <= ascended(problem, queries, seed=1, turns=1500) <= limit


def test_a_hidden_own_key_still_costs_the_own_row() -> None:
    """A private query moves its row whether or not the row sees the record's key; the ascent finds it."""
    mask = ~np.eye(4, dtype=bool)
    problem = masked(mask)
    public, private = (sensitivity(spec(q), problem).value for q in ("public", "private"))
    moved = ascended(problem, "private", seed=2, turns=1500)
    assert public < moved <= private
    # a public query moves nothing, and the row that does not see the key does not count
    assert public == pytest.approx(2 * math.sqrt(3) * max_weight(3, 1.0), rel=1e-4)


def test_a_query_without_keys_and_a_key_without_rows_cost_nothing() -> None:
    mask = np.array([[0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=bool)
    alone = sensitivity(spec("private"), masked(mask))
    assert alone.value == pytest.approx(sensitivity(spec("private"), masked(mask[1:, 1:])).value, rel=1e-5)
    assert alone.worst_key == 1
    nothing = np.zeros((3, 3), dtype=bool)
    assert sensitivity(spec("private"), masked(nothing)).value == 0.0
