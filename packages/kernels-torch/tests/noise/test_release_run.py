"""The fast run of a release's noise is the definition's, number for number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_kernels_torch.noise import release_noise, release_run
from dpfa_kernels_torch.noise.normal import minus_log_uniform

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 40, 2, 34), (3, 16, 2, 32), (2, 33, 4, 80), (1, 300, 1, 257)]
KINDS = [("gaussian", "bm32"), ("gaussian", "bm64"), ("laplace", "bm64")]


def made(problem: Callable, shape: tuple[int, ...], **more: Any) -> Any:
    B, S, H, D = shape
    return problem(batch=B, q_len=S, kv_len=S, q_heads=H, kv_heads=1, head_dim=D, **more)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("distribution", "transform"), KINDS)
def test_the_run_is_the_definition(
    problem: Callable, plan: Callable, release_key: Callable, shape: tuple[int, ...], distribution: str, transform: str
) -> None:
    asked = made(problem, shape, causal=True)
    key = release_key(release=2**32 - 3)
    scales: list[dict[str, Any]] = [
        {},
        {"head_scale": tuple(0.1 + h for h in range(shape[2]))},
        {"row_scale": tuple(0.5 + n / 7 for n in range(shape[1] + 1))},
    ]
    for scale in scales:
        planned = plan(distribution=distribution, transform=transform, **scale)
        slow = release_noise.noise_by_definition(asked, planned, key, torch.float32)
        assert torch.equal(release_noise.release_noise(asked, planned, key), slow)
        exact = release_noise.noise_by_definition(asked, planned, key, torch.float64)
        torch.testing.assert_close(
            release_noise.release_noise(asked, planned, key, torch.float64), exact, rtol=4e-15, atol=0.0
        )


@pytest.mark.parametrize("piece", [64, 1 << 9, 1 << 12])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_and_threads_change_nothing(
    problem: Callable, plan: Callable, release_key: Callable, monkeypatch: pytest.MonkeyPatch, piece: int, threads: int
) -> None:
    asked, key = made(problem, (3, 70, 2, 40)), release_key()
    whole = release_noise.release_noise(asked, plan(), key)
    monkeypatch.setattr(release_run, "PIECE", piece)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(release_noise.release_noise(asked, plan(), key), whole)
    finally:
        torch.set_num_threads(before)


def test_no_word_has_an_infinite_or_vanishing_logarithm() -> None:
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    workspace = release_run.Workspace(8)
    found = workspace._minus_log(edges.to(torch.int32), 32).clone()
    torch.testing.assert_close(found, minus_log_uniform(edges, 32), rtol=4e-16, atol=0.0)
    edges = torch.tensor([0, 1, 2**52 - 1, 2**52, 2**53 - 2, 2**53 - 1])
    signed = torch.where(edges < 2**52, edges, edges - 2**53)
    found = workspace._minus_log(signed, 53).clone()
    assert (found > 0).all()
    torch.testing.assert_close(found, minus_log_uniform(edges, 53), rtol=4e-16, atol=0.0)
