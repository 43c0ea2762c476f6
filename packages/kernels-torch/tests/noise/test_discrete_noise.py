"""Discrete Gaussian noise: its law, its exact decisions, and that no two numbers share bits."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats

from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.noise import discrete_noise as module
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.discrete_noise import CHACHA_DISCRETE, PHILOX_DISCRETE, attempt_words, discrete_noise
from dpfa_kernels_torch.noise.layout import evaluate
from dpfa_kernels_torch.noise.words32 import from_uint32

ALPHA = 1e-6


def shape(batch: int = 2, rows: int = 50, heads: int = 3, D: int = 20, **fields: Any) -> AttentionProblem:
    sizes = {"batch": batch, "q_len": rows, "kv_len": 4, "q_heads": heads, "kv_heads": 1, "head_dim": D}
    return AttentionProblem(**sizes, clip_norm=1.0, **fields)


def discrete(scale: float, grid: float = 0.25, **fields: Any) -> NoisePlan:
    base: dict[str, Any] = {"distribution": "discrete_gaussian", "transform": "bm64", "grid": grid}
    return NoisePlan(mechanism="discrete_gaussian", head_scale=(scale,), **base | fields)


@pytest.mark.parametrize("scale", [0.1, 0.25, 0.3, 1.0, 4.05, 250.0])
@pytest.mark.parametrize("generator", ["chacha20", "philox4x32-10"])
def test_the_law_is_the_discrete_gaussian(release_key: Callable, scale: float, generator: str) -> None:
    noise = discrete_noise(shape(batch=4, rows=80), discrete(scale), release_key(generator)).flatten()
    width = scale / 0.25
    assert (noise == noise.round()).all()
    most = max(1, math.ceil(6 * width))
    support = torch.arange(-most, most + 1, dtype=torch.float64)
    law = torch.exp(-support.square() / (2 * width**2))
    law /= law.sum()
    # cells that hold enough, from the lower end on
    edges, expected, mass = [], [], 0.0
    for value, share in zip(support.tolist(), law.tolist(), strict=True):
        mass += share
        if mass * len(noise) >= 25:
            edges.append(value)
            expected.append(mass)
            mass = 0.0
    expected[-1] += mass
    if len(expected) == 1:
        assert (noise == 0).all()
        return
    cells = torch.bucketize(noise, torch.tensor(edges[:-1], dtype=torch.float64))
    counts = torch.bincount(cells, minlength=len(expected)).double()
    found = stats.chisquare(counts.numpy(), torch.tensor(expected, dtype=torch.float64).numpy() * len(noise))
    assert found.pvalue > ALPHA


def test_doubtful_decisions_are_the_same_by_decimals(monkeypatch: pytest.MonkeyPatch, release_key: Callable) -> None:
    """Where 53 bits decide, 128 bits decide alike; forced to, every trial asks the decimals."""
    small = shape(batch=1, rows=10, heads=1, D=8)
    fast = discrete_noise(small, discrete(3.3), release_key())
    asked = []
    exactly = module._exactly_taken
    monkeypatch.setattr(module, "_exactly_taken", lambda *inputs: asked.append(inputs) or exactly(*inputs))
    monkeypatch.setattr(module, "DOUBT", 1e3)
    assert torch.equal(discrete_noise(small, discrete(3.3), release_key()), fast)
    assert len(asked) > 80


def test_a_coin_next_to_the_probability_is_decided_by_its_later_bits() -> None:
    # size 0 with v = 0 is taken with probability exp(1/2) / 2: the last coin below it, and the next one
    with decimal.localcontext(decimal.Context(prec=100)):
        last = int(decimal.Decimal("0.5").exp() / 2 * 2**128)
    coins = (last - 2**80, last, last + 1, last + 2**80)
    words = torch.zeros(4, 8, dtype=torch.int64)
    words[:, 2] = 1
    for row, coin in enumerate(coins):
        for place, shift in ((4, 96), (3, 64), (6, 32), (7, 0)):
            words[row, place] = (coin >> shift) & 0xFFFFFFFF
    assert module.trial(words, torch.ones(4, dtype=torch.float64))[1].tolist() == [True, True, False, False]


@pytest.mark.parametrize(("layout", "step"), [(CHACHA_DISCRETE, 1), (PHILOX_DISCRETE, 4)])
def test_no_two_numbers_or_attempts_share_a_counter(layout: Any, step: int) -> None:
    sizes = {"batch": 2, "head": 3, "row": 5, "column": 7, "release": 2, "attempt": 4 * step}
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes.values()), indexing="ij")
    coordinates = {name: axis.flatten() for name, axis in zip(sizes, axes, strict=True)}
    words, _ = evaluate(layout, coordinates, {"H": 3, "D": 7})
    rows = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    assert len(torch.unique(rows, dim=0)) == math.prod(sizes.values())


def test_the_fast_first_attempt_is_the_same_key_stream(release_key: Callable) -> None:
    key = release_key(release=5)
    number = torch.arange(2 * 3 * 4 * 5)
    left = {"batch": number // 60, "head": number // 20 % 3, "row": number // 5 % 4, "column": number % 5}
    counts = {"H": 3, "D": 5}
    release, attempt = key.release.view(torch.int64), torch.tensor([0])
    place, _ = evaluate(CHACHA_DISCRETE, {**left, "release": release, "attempt": attempt}, counts)
    assert torch.equal(attempt_words(key, left, 0, counts), chacha20(from_uint32(key.words), place))


def test_numbers_are_independent_of_their_neighbours_and_of_the_chunk(
    monkeypatch: pytest.MonkeyPatch, release_key: Callable
) -> None:
    noise = discrete_noise(shape(), discrete(4.0), release_key()).transpose(1, 2).flatten()
    for lag in (1, 20, 50 * 20):
        correlation = torch.corrcoef(torch.stack([noise[lag:], noise[:-lag]]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(len(noise))
    monkeypatch.setattr(module, "CHUNK", 777)
    assert torch.equal(discrete_noise(shape(), discrete(4.0), release_key()).transpose(1, 2).flatten(), noise)
    assert not torch.equal(discrete_noise(shape(), discrete(4.0), release_key(release=1)).flatten(), noise)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_lie_on_the_grid_and_the_sum_is_rounded_once(
    backend: TorchBackend, release_key: Callable, dtype: str
) -> None:
    problem, plan = shape(dtype=dtype), discrete(3.0, row_scale=(1.0, 1.0, 1.0, 1.0, 2.0))
    x = torch.randn(2, 50, 3, 20, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    noise = discrete_noise(problem, plan, release_key())
    assert 23 < noise.std() < 25
    expected = (torch.round(x.double() * 4) / 4 + noise / 4).float().to(x.dtype)
    out = backend.privatize_(x, problem, plan, None, release_key(), clip_rows=False)
    assert torch.equal(out, expected)
    if dtype == "float32":
        assert (out * 4 == (out * 4).round()).all()
