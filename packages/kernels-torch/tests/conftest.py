"""Keys, problems and plans that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_core.contracts import NoiseKey
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch import KeySource, TorchBackend


@pytest.fixture
def backend() -> TorchBackend:
    return TorchBackend()


@pytest.fixture
def release_key() -> Callable[..., NoiseKey]:
    """The first release key of a seeded source: the same words at every call."""

    def make(generator: str = "chacha20", release: int = 0, seed: int = 11) -> NoiseKey:
        key = KeySource(seed, generator=generator).key("release")
        number = torch.tensor([release], dtype=torch.uint64)
        return NoiseKey(key.generator, key.purpose, key.words, number, key.secure)

    return make


@pytest.fixture
def training_key() -> Callable[..., NoiseKey]:
    def make(generator: str = "chacha20", seed: int = 11) -> NoiseKey:
        return KeySource(seed, generator=generator).key("training")

    return make


@pytest.fixture
def problem() -> Callable[..., AttentionProblem]:
    """A small problem of odd sizes; any field can be given."""

    def make(**fields: Any) -> AttentionProblem:
        sizes = {"batch": 2, "q_len": 7, "kv_len": 9, "q_heads": 4, "kv_heads": 2, "head_dim": 5}
        return AttentionProblem(**{**sizes, **fields})

    return make


@pytest.fixture
def plan() -> Callable[..., NoisePlan]:
    """Gaussian noise of std 1/4 by the 53-bit profile; any field can be given."""

    def make(**fields: Any) -> NoisePlan:
        base = {
            "mechanism": "gaussian",
            "distribution": "gaussian",
            "head_scale": (0.25,),
            "transform": "bm64",
        }
        return NoisePlan(**{**base, **fields})

    return make


@pytest.fixture
def noiseless() -> NoisePlan:
    return NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,))


@pytest.fixture
def inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random q, k, v of a problem's shapes and dtype."""

    def make(problem: AttentionProblem, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, problem.dtype)

        def draw(length: int, heads: int) -> torch.Tensor:
            shape = (problem.batch, length, heads, problem.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return (
            draw(problem.q_len, problem.q_heads),
            draw(problem.kv_len, problem.kv_heads),
            draw(problem.kv_len, problem.kv_heads),
        )

    return make
