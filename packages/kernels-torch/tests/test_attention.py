"""Noiseless release against a definition in loops, and the rules for what cannot be computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_core.visibility import lengths, visible_range
from dpfa_kernels_torch import TorchBackend, attention

SCALE = 0.4
NAN, INF = float("nan"), float("inf")


def random_mask(rows: int, keys: int) -> bytes:
    """Half of the keys, a row that sees none among them."""
    seen = np.random.default_rng(0).random((rows, keys)) < 0.5
    seen[2] = False
    return np.packbits(seen).tobytes()


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "causal, more queries than keys": {"causal": True, "q_len": 9, "kv_len": 5},
    "window": {"window": (2, 1)},
    "causal window": {"window": (3, -1), "causal": True},
    "one key head": {"kv_heads": 1},
    "as many key heads": {"kv_heads": 4},
    "lengths": {"lengths": ((7, 9), (3, 4))},
    "lengths, causal": {"lengths": ((5, 2), (0, 6)), "causal": True},
    "no keys": {"lengths": ((7, 0), (7, 9))},
    "logit bound": {"logit_bound": 0.7, "causal": True},
    "large logit bound": {"logit_bound": 60.0, "window": (0, 3)},
    "value clip": {"clip_norm": 0.8},
    "output clip": {"clip_norm": 0.3, "clip": "output"},
    "one by one": {"batch": 1, "q_len": 1, "kv_len": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 1},
    "mask": {"mask": random_mask(7, 9)},
    "mask, causal, logit bound": {"mask": random_mask(7, 9), "causal": True, "logit_bound": 0.7},
    "mask, window, lengths": {"mask": random_mask(7, 9), "window": (2, 3), "lengths": ((7, 9), (5, 6))},
    "odd": {"q_len": 63, "kv_len": 100, "head_dim": 24, "causal": True},
}


def clipped(row: torch.Tensor, norm: float | None, order: int) -> torch.Tensor:
    if norm is None:
        return row
    return row * min(1.0, norm / max(float(torch.linalg.vector_norm(row, order)), 1e-300))


def seen_by(problem: AttentionProblem, batch_row: int, row: int) -> list[int]:
    """Bit by bit: what the ranges show and the mask does not hide."""
    keys = range(*visible_range(dataclasses.replace(problem, mask=None), row, batch_row))
    if problem.mask is None:
        return list(keys)
    places = [row * problem.kv_len + key for key in keys]
    return [key for key, at in zip(keys, places, strict=True) if problem.mask[at // 8] >> (7 - at % 8) & 1]


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: AttentionProblem,
    scale: float = SCALE,
    order: int = 2,
) -> torch.Tensor:
    """Every output row by itself, in Python loops and float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = problem.q_heads // problem.kv_heads
    for b in range(problem.batch):
        for i in range(lengths(problem, b)[0]):
            keys = seen_by(problem, b, i)
            for h in range(problem.q_heads):
                if not keys:
                    continue
                logits = [scale * float(q[b, i, h] @ k[b, j, h // group]) for j in keys]
                if problem.logit_bound is not None:
                    logits = [problem.logit_bound * math.tanh(x / problem.logit_bound) for x in logits]
                top = max(logits)
                weights = torch.tensor([math.exp(x - top) for x in logits], dtype=torch.float64)
                values = [v[b, j, h // group] for j in keys]
                if problem.clip == "value":
                    values = [clipped(value, problem.clip_norm, order) for value in values]
                row = (weights / weights.sum()) @ torch.stack(values)
                out[b, i, h] = clipped(row, problem.clip_norm if problem.clip == "output" else None, order)
    return out


def released(
    backend: TorchBackend, inputs: tuple, problem: AttentionProblem, plan: NoisePlan, scale: float = SCALE
) -> torch.Tensor:
    return backend.release(*inputs, problem, plan, None, None, softmax_scale=scale)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_release_without_noise_is_attention(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan, case: str, dtype: str
) -> None:
    shape = problem(dtype=dtype, **CASES[case])
    tensors = inputs(shape)
    out = released(backend, tensors, shape, noiseless)
    assert out.dtype == tensors[0].dtype
    tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    torch.testing.assert_close(
        out.double(), by_definition(*tensors, shape), rtol=tolerance, atol=max(tolerance / 4, 3e-6)
    )


@pytest.mark.parametrize("clip", ["value", "output"])
def test_rows_are_clipped_in_the_plans_norm(
    backend: TorchBackend, problem: Callable, inputs: Callable, clip: str
) -> None:
    shape = problem(clip=clip, clip_norm=0.5)
    tensors = inputs(shape)
    plan = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,), norm="l1")
    out = released(backend, tensors, shape, plan)
    torch.testing.assert_close(out.double(), by_definition(*tensors, shape, order=1), rtol=1e-5, atol=1e-6)
    assert out.abs().sum(-1).max() <= 0.5


def test_equals_torch_attention(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    shape = problem(q_len=100, kv_len=100, kv_heads=4, head_dim=16, causal=True)
    tensors = inputs(shape)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), is_causal=True, scale=SCALE
    )
    out = released(backend, tensors, shape, noiseless)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_blocks_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch,
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    noiseless: NoisePlan,
) -> None:
    for case in ("causal window", "lengths, causal", "dense", "mask", "mask, window, lengths"):
        shape = problem(dtype="float64", **CASES[case])
        tensors = inputs(shape)
        monkeypatch.setattr(attention, "LOGITS", 1 << 20)
        whole = released(backend, tensors, shape, noiseless)
        for logits in (1, 4 * 9 * 2, 4 * 9 * 7):
            monkeypatch.setattr(attention, "LOGITS", logits)
            torch.testing.assert_close(released(backend, tensors, shape, noiseless), whole)


def test_hidden_keys_stay_hidden_under_the_logit_bound(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    """A mask added before tanh would turn into -B and show the future."""
    shape = problem(q_len=9, causal=True, logit_bound=1.0)
    q, k, v = inputs(shape)
    before = released(backend, (q, k, v), shape, noiseless)
    k[:, 5:], v[:, 5:] = 100.0, -100.0
    after = released(backend, (q, k, v), shape, noiseless)
    assert torch.equal(before[:, :5], after[:, :5])


def test_what_a_mask_hides_stays_hidden_under_the_logit_bound(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    seen = torch.ones(7, 9, dtype=torch.bool)
    seen[:, 4] = False
    shape = problem(mask=np.packbits(seen.numpy()).tobytes(), logit_bound=1.0)
    q, k, v = inputs(shape)
    before = released(backend, (q, k, v), shape, noiseless)
    k[:, 4], v[:, 4] = 100.0, -100.0
    assert torch.equal(released(backend, (q, k, v), shape, noiseless), before)


def test_weight_of_one_key_does_not_depend_on_another() -> None:
    """To the last bit with a logit bound; without one the row's maximum rounds every weight anew."""
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(5))
    other = logits.clone()
    other[:, 0] = 3.3
    visible = torch.ones(9, dtype=torch.bool)

    def others(x: torch.Tensor, bound: float | None) -> torch.Tensor:
        weights = attention.softmax_weights(x, visible, bound)[0][:, 1:]
        return weights if bound else weights / weights[:, :1]

    assert torch.equal(others(logits, 4.0), others(other, 4.0))
    assert not torch.equal(others(logits, None), others(other, None))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("bound", [None, 1.0])
def test_non_finite_rows_become_zeros_silently(
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    noiseless: NoisePlan,
    bad: float,
    bound: float | None,
) -> None:
    for position in range(3):
        shape = problem(clip_norm=0.7, logit_bound=bound)
        spoiled, zeroed = inputs(shape), inputs(shape)
        spoiled[position][1, 2, 0, 3] = bad
        zeroed[position][1, 2, 0] = 0.0
        out = released(backend, spoiled, shape, noiseless)
        assert torch.equal(out, released(backend, zeroed, shape, noiseless))
        assert torch.isfinite(out).all()


def test_non_finite_logit_counts_as_zero(backend: TorchBackend, problem: Callable, noiseless: NoisePlan) -> None:
    shape = problem(batch=1, q_len=1, kv_len=3, q_heads=1, kv_heads=1, head_dim=2)
    q = torch.full((1, 1, 1, 2), 1e25)
    k = torch.tensor([0.0, 1e25, -1e25]).reshape(1, 3, 1, 1).repeat(1, 1, 1, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 0.0]]).reshape(1, 3, 1, 2)
    out = released(backend, (q, k, v), shape, noiseless)
    torch.testing.assert_close(out.flatten(), v.mean(1).flatten())


def test_overflowing_squared_norm_gives_a_zero_row(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    shape = problem(clip_norm=1.0)
    q, k, v = inputs(shape)
    huge, zeroed = v.clone(), v.clone()
    huge[0, 3, 1] = 3e38
    zeroed[0, 3, 1] = 0.0
    expected = released(backend, (q, k, zeroed), shape, noiseless)
    assert torch.equal(released(backend, (q, k, huge), shape, noiseless), expected)


def test_autocast_does_not_lower_the_precision(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    shape = problem(head_dim=24)
    tensors = inputs(shape)
    plain, saved = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    grads = backend.release_backward(plain, saved)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(released(backend, tensors, shape, noiseless), plain)
        for found, expected in zip(backend.release_backward(plain, saved), grads, strict=True):
            assert torch.equal(found, expected)


def test_tf32_setting_does_not_lower_the_precision(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    shape = problem(head_dim=24)
    tensors = inputs(shape)
    torch.set_float32_matmul_precision("medium")
    try:
        out = released(backend, tensors, shape, noiseless)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(out.double(), by_definition(*tensors, shape), rtol=2**-23, atol=1e-7)
