"""Emulates the kernels' roundings in float64 and looks for records that beat the bound."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dpfa_core.contracts import SUMMED_KEYS
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.rounding import accumulation, clipped_norm, output_norm
from dpfa_mechanisms.sensitivity import max_weight, sensitivity

Array = NDArray[np.float64]


def rounded(x: Array, dtype: str) -> Array:
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float64)
    if dtype == "float32":
        return x.astype(np.float32).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def problem(n: int, width: int, dtype: str, bound: float | None = None, clip_norm: float = 1.0) -> AttentionProblem:
    return AttentionProblem(
        batch=1,
        q_len=1,
        kv_len=n,
        q_heads=1,
        kv_heads=1,
        head_dim=width,
        clip_norm=clip_norm,
        logit_bound=bound,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("clip_norm", [1.0, 3e-3, 1e-6])
def test_rounded_rows_stay_below_the_output_norm(dtype: str, clip_norm: float) -> None:
    rng = np.random.default_rng(0)
    n, width = 64, 96
    case = problem(n, width, dtype, clip_norm=clip_norm)
    longest = 0.0
    for spread in (0.1, 1.0, 8.0):
        values = rng.standard_normal((n, width)) * np.exp(rng.standard_normal((n, width)) * spread)
        values = rounded(values * (clip_norm / np.linalg.norm(values, axis=1, keepdims=True)), dtype)
        assert np.linalg.norm(values, axis=1).max() <= output_norm(
            case,
            "l2",
        )
        logits = rng.standard_normal(n) * spread
        exponentials = np.exp(logits - logits.max())
        output = rounded(exponentials, dtype) @ np.abs(values) / exponentials.sum()
        longest = max(longest, float(np.linalg.norm(output)))
        assert longest <= output_norm(case, "l2")


@pytest.mark.parametrize("clip", ["output", "value"])
def test_margin_is_not_idle(clip: str) -> None:
    """bfloat16 really lengthens rows beyond the clip norm: once for a clipped row, again for its weights."""
    above = 1.0 + 2.0**-8 + 2.0**-12
    values = np.full((1, 64), above)
    norm = float(np.linalg.norm(values))
    grown = float(np.linalg.norm(rounded(values, "bfloat16")))
    if clip == "value":
        exponentials = np.append(np.full(4096, above / 2), 1.0)
        grown *= float(rounded(exponentials, "bfloat16").sum() / exponentials.sum())
    case = dataclasses.replace(problem(64, 64, "bfloat16", clip_norm=norm), clip=clip)
    assert grown > norm * (1 + 2.0**-8) ** (0.9 if clip == "output" else 1.8)
    assert grown <= output_norm(case, "l2")


def one_sum(terms: NDArray[np.float32]) -> NDArray[np.float32]:
    """One term after the other, in float32."""
    return np.add.accumulate(terms, axis=0)[-1]


def sum_of_sums(terms: NDArray[np.float32]) -> NDArray[np.float32]:
    parts = [one_sum(terms[start : start + SUMMED_KEYS]) for start in range(0, len(terms), SUMMED_KEYS)]
    return one_sum(np.stack(parts))


def loss_of_a_mean(n: int, add: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> float:
    """Largest relative error of the mean of n equal numbers with equal weights, over many numbers and weights."""
    numbers = np.linspace(1.0, 2.0, 150, dtype=np.float32)
    numerator = add(np.broadcast_to(numbers * np.float32(0.625), (n, 150)))
    denominator = add(np.broadcast_to(np.float32(0.625), (n, 1)))
    return float(np.abs((numerator / denominator).astype(np.float64) / numbers - 1.0).max())


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 511, 513, 4096, 20_000])
def test_sums_of_sums_lose_less_than_is_allowed_for(n: int) -> None:
    assert loss_of_a_mean(n, sum_of_sums) <= accumulation(n)
    assert n > SUMMED_KEYS or loss_of_a_mean(n, one_sum) <= accumulation(n)


def test_one_sum_of_many_keys_would_lose_more() -> None:
    assert loss_of_a_mean(20_000, one_sum) > 2 * accumulation(20_000)


def test_allowance_grows_by_parts_and_never_falls() -> None:
    allowed = [accumulation(n) for n in range(1, 5000)]
    assert all(now <= then for now, then in itertools.pairwise(allowed))
    assert allowed[255] == (256 + 3) * 2.0**-23
    assert accumulation(65_536) == (256 + 256 + 3) * 2.0**-23


def token_attack(n: int, bound: float, dtype: str, *, subtract_maximum: bool) -> float:
    """Replace one key; every other value points along the change of its own rounded weight."""
    rng = np.random.default_rng(1)
    others = rng.uniform(-bound, bound / 2, n - 1)

    def weights(own: float) -> tuple[Array, float]:
        logits = np.append(others, own)
        shift = logits.max() if subtract_maximum else bound
        exponentials = np.exp(logits - shift)
        return rounded(exponentials, dtype), float(exponentials.sum())

    worst = 0.0
    for own in np.linspace(bound / 2, bound, 9):
        before, total_before = weights(bound)
        after, total_after = weights(float(own))
        change = before / total_before - after / total_after
        values = np.sign(change[:-1])
        moved = float(change[:-1] @ values) + before[-1] / total_before + after[-1] / total_after
        worst = max(worst, moved)
    return worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_token_bound_survives_low_precision_weights(dtype: str, bound: float) -> None:
    n = 2048
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="public")
    bounded = sensitivity(spec, problem(n, 1, dtype, bound)).value
    assert token_attack(n, bound, dtype, subtract_maximum=False) <= bounded


def test_subtracting_the_row_maximum_would_break_it() -> None:
    """The reason for the public constant: a data-dependent maximum re-rounds every other weight."""
    n, bound = 4096, 0.5
    moved = token_attack(n, bound, "bfloat16", subtract_maximum=True)
    assert moved > 2 * 2 * max_weight(n, bound)


def test_margins_are_of_the_size_of_one_rounding() -> None:
    for dtype, size in [("float32", 1e-5), ("bfloat16", 0.009), ("float16", 0.002)]:
        assert 1.0 < output_norm(problem(16, 64, dtype), "l2") < 1.0 + size


def test_no_clip_norm_is_refused() -> None:
    case = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1)
    with pytest.raises(PrivacyParameterError, match="clip_norm must be a number to bound a row, got None"):
        clipped_norm(case, "l2")
