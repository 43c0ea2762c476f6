"""Bounds of query, key and value against what a search finds."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.component_bounds import component_bounds, swung_weight, turned_weight
from dpfa_mechanisms.sensitivity import own_row_factor

B, C = 0.75, 1.5


def problem(n: int, **options: Any) -> AttentionProblem:
    shape = {"batch": 1, "q_len": n, "kv_len": n, "q_heads": 1, "kv_heads": 1, "head_dim": 4}
    return AttentionProblem(**(shape | {"clip_norm": C, "logit_bound": B} | options))


def spec(unit: Literal["sequence", "token"], queries: Any = "private") -> PrivacySpec:
    return PrivacySpec(epsilon=1.0, delta=1e-6, unit=unit, queries=queries)


@pytest.mark.parametrize("n", [2, 3, 8, 17])
def test_half_of_the_keys_are_the_worst_split(n: int) -> None:
    up = math.exp(2 * B)
    splits = [a * up / (a * up + n - a) - a / (a + (n - a) * up) for a in range(1, n)]
    assert turned_weight(n, B) == pytest.approx(max(splits), rel=1e-12)
    assert turned_weight(n, B) < own_row_factor(n, B)
    assert turned_weight(1, B) == turned_weight(0, B) == 0.0
    assert turned_weight(2 * n, math.inf) == 1.0


@pytest.mark.parametrize("n", [2, 3, 8, 17])
def test_the_others_that_make_one_key_gain_most(n: int) -> None:
    sums = [(n - 1) * math.exp(B * step / 500) for step in range(-500, 501)]
    gains = [math.exp(B) / (math.exp(B) + s) - math.exp(-B) / (math.exp(-B) + s) for s in sums]
    assert max(gains) <= swung_weight(n, B) <= max(gains) * (1 + 1e-5)
    assert swung_weight(1, B) == 0.0
    assert swung_weight(n, math.inf) == 1.0


def row(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ values


def searched(unit: str, part: str, n: int, rng: np.random.Generator) -> float:
    """The furthest that a row moved among corners and random points of all that is allowed."""
    most = 0.0
    for trial in range(400):
        corners = trial % 2 == 0
        logits = rng.uniform(-B, B, n)
        values = rng.standard_normal((n, 4))
        if corners:
            logits = B * np.where(rng.permutation(n) < rng.integers(1, n), 1.0, -1.0)
            values = np.zeros((n, 4))
            values[:, 0] = np.sign(logits)
        values *= C / np.linalg.norm(values, axis=1, keepdims=True)
        other_logits, other_values = logits.copy(), values.copy()
        changed = slice(None) if unit == "sequence" else slice(0, 1)
        if part == "value":
            if corners and unit == "token":
                logits[:], logits[0] = -B, B
                other_logits = logits.copy()
            if corners and unit == "sequence":
                values[:, 0] = C
            other_values[changed] = -values[changed]
        elif part == "query":
            other_logits = -logits if corners else rng.uniform(-B, B, n)
        else:
            if corners and unit == "token":
                logits[:], logits[0] = max(-B, -math.log(n - 1)), B
                values[:, 0] = -C
                values[0, 0] = C
                other_values = values.copy()
                other_logits = logits.copy()
            other_logits[changed] = -logits[changed] if corners else rng.uniform(-B, B, n)[changed]
        most = max(most, float(np.linalg.norm(row(logits, values) - row(other_logits, other_values))))
    return most


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_no_search_passes_a_bound_and_it_is_near(unit: Any, part: str, n: int) -> None:
    bound = getattr(component_bounds(spec(unit), problem(n), "l2", n), part)
    found = searched(unit, part, n, np.random.default_rng(n))
    assert found <= bound
    assert found >= 0.99 * bound


def test_public_queries_cannot_move_and_an_output_clip_bounds_everything_alike() -> None:
    assert component_bounds(spec("token", "public"), problem(8), "l2", 8).query == 0.0
    found = component_bounds(spec("sequence"), problem(8, clip="output", logit_bound=None), "l2", 8)
    assert found.query == found.key == found.value == pytest.approx(2 * C, rel=1e-5)
    nothing = component_bounds(spec("token"), problem(8), "l2", 0)
    assert nothing.query == nothing.key == nothing.value == 0.0
    assert component_bounds(spec("token"), problem(8, logit_bound=20.0), "l2", 8).key == pytest.approx(2 * C, rel=1e-5)
    with pytest.raises(PrivacyParameterError, match="no sensitivity"):
        component_bounds(spec("token"), problem(8, logit_bound=None), "l2", 8)
