"""Records are really replaced, in float64, and the distance of the two outputs is compared with the bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.sensitivity import max_weight, own_row_factor, sensitivity

Array = NDArray[np.float64]


def visible(problem: AttentionProblem, queries: int, keys: int) -> NDArray[np.bool_]:
    """Written from the definition, independently of dpfa_core.visibility."""
    diagonal = np.arange(queries)[:, None] + keys - queries
    key = np.arange(keys)[None, :]
    seen = np.ones((queries, keys), dtype=bool)
    left, right = problem.window
    if left >= 0:
        seen &= key >= diagonal - left
    if right >= 0:
        seen &= key <= diagonal + right
    if problem.causal:
        seen &= key <= diagonal
    return seen


def attention(problem: AttentionProblem, q: Array, k: Array, v: Array, order: int = 2) -> Array:
    """q (Sq, Hq, D), k, v (Sk, Hk, D): clip, cap, mask, softmax, weighted mean, output clip; (Sq, Hq, D)."""
    group = problem.q_heads // problem.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    if problem.clip == "value":
        v = clipped(v, problem.clip_norm or 0.0, order)
    logits = np.einsum("ihd,jhd->hij", q, k)
    if problem.logit_bound is not None:
        logits = problem.logit_bound * np.tanh(logits / problem.logit_bound)
    logits = np.where(visible(problem, len(q), len(k)), logits, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
        weights = np.nan_to_num(weights / weights.sum(axis=-1, keepdims=True))
    output = np.einsum("hij,jhd->ihd", weights, v)
    return clipped(output, problem.clip_norm or 0.0, order) if problem.clip == "output" else output


def clipped(x: Array, clip_norm: float, order: int) -> Array:
    norms = np.linalg.norm(x, ord=order, axis=-1, keepdims=True)
    return x * np.minimum(1.0, clip_norm / np.maximum(norms, 1e-300))


def distance(a: Array, b: Array, order: int) -> float:
    return float(np.linalg.norm((a - b).ravel(), ord=order))


def token_spec(queries: str, relation: str = "replace") -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries, relation=relation)  # type: ignore[arg-type]


def sequence_spec(relation: str = "replace") -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence", relation=relation)  # type: ignore[arg-type]


def dense(n: int, bound: float = 1.0, **more: object) -> AttentionProblem:
    settings = {"q_heads": 1, "kv_heads": 1, "head_dim": 2, "clip_norm": 1.0} | more
    return AttentionProblem(batch=1, q_len=n, kv_len=n, logit_bound=bound, **settings)  # type: ignore[arg-type]


@st.composite
def problems(draw: st.DrawFn) -> AttentionProblem:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return AttentionProblem(
        batch=1,
        q_len=draw(st.integers(1, 7)),
        kv_len=draw(st.integers(1, 7)),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        causal=draw(st.booleans()),
        window=(draw(st.integers(-1, 3)), draw(st.integers(-1, 3))),
        clip_norm=draw(st.sampled_from([0.25, 1.0, 7.0])),
        logit_bound=draw(st.sampled_from([0.5, 1.0, 3.0])),
    )


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.sampled_from(["public", "private"]),
    st.sampled_from(["l1", "l2"]),
    st.integers(0, 2**32 - 1),
)
def test_replaced_tokens_never_move_the_output_beyond_the_bound(
    problem: AttentionProblem, queries: str, norm: str, seed: int
) -> None:
    bound = sensitivity(token_spec(queries), problem, norm)  # type: ignore[arg-type]
    order = 1 if norm == "l1" else 2
    rng = np.random.default_rng(seed)
    shift = problem.kv_len - problem.q_len
    # keys without a row, rows without a key (their query alone is a record), and the worst key among them
    records = range(min(0, shift) if queries == "private" else 0, problem.kv_len)
    for record in records:
        for size in (1.0, 30.0):
            q = rng.standard_normal((problem.q_len, problem.q_heads, problem.head_dim)) * size
            k = rng.standard_normal((problem.kv_len, problem.kv_heads, problem.head_dim)) * size
            v = rng.standard_normal((problem.kv_len, problem.kv_heads, problem.head_dim)) * 50
            q2, k2, v2 = q.copy(), k.copy(), v.copy()
            if record >= 0:
                k2[record] *= -1
                v2[record] *= -1
            if queries == "private" and 0 <= record - shift < problem.q_len:
                q2[record - shift] *= -1
            before, after = attention(problem, q, k, v, order), attention(problem, q2, k2, v2, order)
            assert distance(before, after, order) <= bound.value
            counts = visible(problem, problem.q_len, problem.kv_len).sum(axis=1)
            rows = np.linalg.norm(before - after, ord=order, axis=-1).max(axis=1)
            assert np.all(rows <= np.array(bound.row_bound)[counts])
            # removal: a null token in the same slot
            if record >= 0:
                k2[record] = v2[record] = 0
            if queries == "private" and 0 <= record - shift < problem.q_len:
                q2[record - shift] = 0
            assert distance(before, attention(problem, q, k2, v2, order), order) <= bound.value
            assert distance(before, attention(problem, q2, k2, v2, order), order) <= bound.value


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["value", "output"]), st.sampled_from(["l1", "l2"]), st.integers(0, 2**32 - 1))
def test_replaced_sequences_never_move_the_output_beyond_the_bound(
    problem: AttentionProblem, clip: str, norm: str, seed: int
) -> None:
    import dataclasses

    problem = dataclasses.replace(problem, clip=clip, logit_bound=None)
    order = 1 if norm == "l1" else 2
    rng = np.random.default_rng(seed)
    outputs = []
    for _ in range(2):
        q = rng.standard_normal((problem.q_len, problem.q_heads, problem.head_dim)) * 5
        k = rng.standard_normal((problem.kv_len, problem.kv_heads, problem.head_dim)) * 5
        v = rng.standard_normal((problem.kv_len, problem.kv_heads, problem.head_dim)) * 50
        outputs.append(attention(problem, q, k, v, order))
    replace = sensitivity(sequence_spec(), problem, norm)  # type: ignore[arg-type]
    removal = sensitivity(sequence_spec("add_or_remove"), problem, norm)  # type: ignore[arg-type]
    assert distance(outputs[0], outputs[1], order) <= replace.value
    assert distance(outputs[0], -outputs[0], order) <= replace.value
    assert float(np.linalg.norm(outputs[0].ravel(), ord=order)) <= removal.value
    assert removal.value == pytest.approx(replace.value / 2)


def test_sequence_bound_is_attained() -> None:
    problem = dense(5, q_heads=2, kv_heads=1)
    v = np.zeros((5, 1, 2))
    v[..., 0] = 9.0
    q, k = np.zeros((5, 2, 2)), np.zeros((5, 1, 2))
    reached = distance(attention(problem, q, k, v), attention(problem, q, k, -v), 2)
    assert reached == pytest.approx(2 * math.sqrt(5 * 2))
    assert reached == pytest.approx(sensitivity(sequence_spec(), problem).value, rel=1e-4)


def extremal(problem: AttentionProblem, queries: str, key: int) -> float:
    """The worst record: its key up and all others down for every row; its own row turned over completely."""
    rows, keys, huge = problem.q_len, problem.kv_len, 1e3
    k = np.zeros((keys, problem.kv_heads, 2))
    k[:, :, 0], k[key, :, 0] = -huge, huge
    q = np.zeros((rows, problem.q_heads, 2))
    q[..., 0] = 1.0
    v = np.zeros_like(k)
    v[..., 0] = 1.0
    own = key - (keys - rows)
    turned = queries == "private" and 0 <= own < rows
    if turned:
        # the second coordinate is seen by the own row alone: half of its other keys up, half down
        others = [other for other in np.flatnonzero(visible(problem, rows, keys)[own]) if other != key]
        k[others[::2], :, 1], k[others[1::2], :, 1] = huge, -huge
        v[others[1::2], :, 0] = -1.0
    q2, k2, v2 = q.copy(), k.copy(), v.copy()
    v2[key] *= -1
    if turned:
        q[own], q2[own] = [0.0, 1.0], [0.0, -1.0]
        k[key, :, 1], k2[key, :, 1] = huge, huge * -1
    return distance(attention(problem, q, k, v), attention(problem, q2, k2, v2), 2)


@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 32])
@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
def test_dense_token_bound_is_attained(queries: str, n: int, bound: float) -> None:
    problem = dense(n, bound)
    limit = sensitivity(token_spec(queries), problem)
    assert 0.9999 * limit.value <= extremal(problem, queries, limit.worst_key or 0) <= limit.value


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(["public", "private"]))
def test_token_bound_is_attained_at_the_worst_key(problem: AttentionProblem, queries: str) -> None:
    """Causal, windows, fewer or more keys than rows, query heads that share a key head."""
    import dataclasses

    problem = dataclasses.replace(problem, head_dim=2, clip_norm=1.0)
    limit = sensitivity(token_spec(queries), problem)
    assert 0.9999 * limit.value <= extremal(problem, queries, limit.worst_key or 0) <= limit.value


@pytest.mark.parametrize("queries", ["public", "private"])
def test_random_search_comes_close_to_the_dense_bound(queries: str) -> None:
    """A search that knows nothing of the proof: hill climbing on the raw tensors (n = 8, B = 1)."""
    problem = dense(8, head_dim=3)
    limit = sensitivity(token_spec(queries), problem).value
    rng = np.random.default_rng(3)
    best, state = (
        0.0,
        [rng.standard_normal((8, 1, 3)) * 3 for _ in range(3)] + [rng.standard_normal((3, 3)) * 3],
    )

    def moved(point: list[Array]) -> float:
        q, k, v, new = point
        q2, k2, v2 = q.copy(), k.copy(), v.copy()
        k2[0, 0], v2[0, 0] = new[0], new[1]
        if queries == "private":
            q2[0, 0] = new[2]
        return distance(attention(problem, q, k, v), attention(problem, q2, k2, v2), 2)

    step = 3.0
    for turn in range(20_000):
        change = [x + step * rng.standard_normal(x.shape) * (rng.random(x.shape) < 0.15) for x in state]
        value = moved(change)
        if value > best:
            best, state = value, change
        if turn % 4000 == 3999:
            step *= 1.5
        if best >= 0.95 * limit:
            break
    assert 0.95 * limit <= best <= limit


def test_worked_numbers() -> None:
    problem = dense(32, 0.5)
    public, private = (sensitivity(token_spec(q), problem) for q in ("public", "private"))
    assert public.value == pytest.approx(0.912, abs=5e-4)
    assert private.value == pytest.approx(1.32, abs=5e-3)
    assert public.naive == pytest.approx(11.31, abs=5e-3)
    assert (public.item, private.item) == ("P3.token.public", "P3.token.private")


def test_even_split_is_the_worst_own_row() -> None:
    for bound in (0.1, 0.5, 1.0, 4.0):
        factor = math.exp(2 * bound)
        for n in range(1, 40):
            splits = [1 - (n - 1 - a) / ((n - 1 - a) + (a + 1) * factor) - a / (a + (n - a) * factor) for a in range(n)]
            assert own_row_factor(n, bound) == pytest.approx(max(splits), rel=1e-12)
            assert own_row_factor(n, bound) >= max_weight(n, bound) - 1e-15
    assert own_row_factor(100_001, 0.7) == pytest.approx(math.tanh(0.7), rel=1e-4)
    assert max_weight(0, 1.0) == own_row_factor(0, 1.0) == 0.0


def test_huge_logit_bounds_give_the_naive_row() -> None:
    limit = sensitivity(token_spec("public"), dense(4, 1e6))
    assert limit.value == pytest.approx(limit.naive)


def test_window_keeps_the_bound_from_growing() -> None:
    wide = [sensitivity(token_spec("public"), dense(n, window=(7, 0), causal=True)).value for n in (64, 256, 1024)]
    assert wide[0] == pytest.approx(wide[2], rel=1e-3)


def test_causal_worst_key_is_the_first() -> None:
    assert sensitivity(token_spec("public"), dense(16, causal=True)).worst_key == 0


def test_lengths_take_the_worst_batch_row() -> None:
    padded = AttentionProblem(
        batch=3,
        q_len=16,
        kv_len=16,
        q_heads=2,
        kv_heads=1,
        head_dim=4,
        causal=True,
        lengths=((3, 9), (12, 12), (12, 12)),
        clip_norm=1.0,
        logit_bound=1.0,
    )
    for queries in ("public", "private"):
        alone = max(
            sensitivity(
                token_spec(queries),
                AttentionProblem(
                    batch=1,
                    q_len=q,
                    kv_len=k,
                    q_heads=2,
                    kv_heads=1,
                    head_dim=4,
                    causal=True,
                    clip_norm=1.0,
                    logit_bound=1.0,
                ),
            ).value
            for q, k in padded.lengths
        )
        assert sensitivity(token_spec(queries), padded).value == pytest.approx(alone, rel=1e-5)
    assert sensitivity(sequence_spec(), padded).value == pytest.approx(2 * math.sqrt(12 * 2), rel=1e-4)


def test_token_bound_never_exceeds_the_naive_one() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        for n in (1, 2, 5):
            limit = sensitivity(token_spec("private"), dense(n, 9.0, dtype=dtype))
            assert limit.value <= limit.naive


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clip": "output"}, 'unit="token" needs clip="value", got \'output\''),
        ({"logit_bound": None}, 'unit="token" needs a logit_bound, got None'),
        ({"clip_norm": None}, "a release needs a finite clip_norm, got None"),
    ],
)
def test_token_unit_refuses_what_it_cannot_bound(change: dict[str, object], text: str) -> None:
    import dataclasses

    problem = dataclasses.replace(dense(4), **change)  # type: ignore[arg-type]
    with pytest.raises(PrivacyParameterError) as refusal:
        sensitivity(token_spec("public"), problem)
    assert text in str(refusal.value)


def test_sequence_unit_takes_any_mask() -> None:
    import dataclasses

    masked = dataclasses.replace(dense(4), mask=b"\x1f\xf4", logit_bound=None)
    assert sensitivity(sequence_spec(), masked).value == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "moving"),
    [
        ({"q_len": 7, "kv_len": 3, "causal": True}, 3),  # the first four rows stand before the first key
        ({"q_len": 7, "kv_len": 3, "window": (0, 1)}, 4),
        ({"q_len": 7, "kv_len": 7, "lengths": ((7, 2), (5, 5), (6, 0)), "batch": 3, "causal": True}, 5),
        ({"q_len": 2, "kv_len": 4, "mask": b"\xf0"}, 1),
    ],
)
def test_only_rows_that_see_a_key_make_the_sequence_bound_and_it_is_attained(
    change: dict[str, object], moving: int
) -> None:
    import dataclasses

    problem = dataclasses.replace(dense(4, q_heads=2), **change)  # type: ignore[arg-type]
    for norm, whole in (("l2", 2 * math.sqrt(2 * moving)), ("l1", 4 * moving)):
        limit = sensitivity(sequence_spec(), problem, norm)  # type: ignore[arg-type]
        assert limit.value == limit.naive
        assert whole <= limit.value <= whole * (1 + 1e-4)
    if not problem.lengths and problem.mask is None:
        q, k, v = np.zeros((7, 2, 2)), np.zeros((3, 1, 2)), np.zeros((3, 1, 2))
        v[..., 0] = 1.0
        moved = distance(attention(problem, q, k, v), attention(problem, q, k, -v), 2)
        assert moved == pytest.approx(2 * math.sqrt(2 * moving))


def test_units_of_training_and_other_norms_are_refused() -> None:
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="example")
    with pytest.raises(PrivacyParameterError, match="examples and users are units of training"):
        sensitivity(spec, dense(4))
    with pytest.raises(PrivacyParameterError, match="norms l1, l2 and whitened_l2, got 'max'"):
        sensitivity(sequence_spec(), dense(4), "max")  # type: ignore[arg-type]
