"""A clipped row's exact norm never exceeds the bound; rounding to a low precision adds its margin."""

from __future__ import annotations

import math

import pytest
import torch

from dpfa_kernels_torch.clipping import clip_rows, norm_upper_bound

NORMS = ["l1", "l2"]


def exact_norm(x: torch.Tensor, norm: str) -> torch.Tensor:
    x = x.double()
    return x.abs().sum(-1) if norm == "l1" else x.square().sum(-1).sqrt()


def every_float16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1.0, 3.7, 1e4])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_exhaustive_float16_rows_stay_within_the_bound(norm: str, clip_norm: float, width: int) -> None:
    values = every_float16()
    order = [torch.randperm(len(values), generator=torch.Generator().manual_seed(i)) for i in range(width - 1)]
    rows = torch.stack([values, *(values[index] for index in order)], -1)
    clipped = clip_rows(rows, clip_norm, norm)
    assert (exact_norm(clipped, norm) <= clip_norm).all()
    margin = (1 + 2**-11) * clip_norm + 2**-25 * (math.sqrt(width) if norm == "l2" else width)
    assert (exact_norm(clipped.half(), norm) <= margin).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [1, 24, 64, 257, 2048])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12])
def test_random_rows_stay_within_the_bound_and_close_to_it(norm: str, width: int, size: float) -> None:
    rows = size * torch.randn(2000, width, generator=torch.Generator().manual_seed(1))
    clip_norm = size * (0.7 * math.sqrt(width) if norm == "l2" else 0.5 * width)
    clipped = clip_rows(rows, clip_norm, norm)
    before, after = exact_norm(rows, norm), exact_norm(clipped, norm)
    assert (after <= clip_norm).all()
    expected = before.clamp(max=clip_norm)
    assert (after >= expected * (1 - 2 * (width + 20) * 2**-24) - math.sqrt(width) * 2**-62).all()
    assert (exact_norm(clipped.bfloat16(), norm) <= clip_norm * (1 + 2**-8)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_short_rows_are_left_alone(norm: str) -> None:
    rows = torch.tensor([[0.0, 0.0], [0.3, -0.4], [1e-40, 0.0]])
    assert torch.equal(clip_rows(rows, 1.0, norm), rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_rows_without_a_finite_norm_become_zeros(norm: str, bad: float) -> None:
    rows = torch.tensor([[bad, bad, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(clip_rows(rows, 1.0, norm)[0], torch.zeros(3))
    assert clip_rows(rows, 1.0, norm)[1, 0] > 0.999


@pytest.mark.parametrize("norm", NORMS)
def test_bound_is_above_the_exact_norm(norm: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for width in (1, 5, 80, 1000):
        rows = torch.randn(1000, width, generator=generator) * torch.randn(1000, 1, generator=generator).mul(20).exp2()
        bound = norm_upper_bound(rows, norm).squeeze(-1).double()
        assert (bound >= exact_norm(rows, norm)).all()


def test_naive_factor_exceeds_the_bound_that_this_one_keeps() -> None:
    """The check can fail: a factor from the norm without its margin goes above."""
    rows = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(3))
    naive = rows * (1.0 / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    assert (exact_norm(naive, "l2") > 1.0).any()
    assert (exact_norm(clip_rows(rows, 1.0, "l2"), "l2") <= 1.0).all()
