"""Laplace noise: the law, symmetry, no atom."""

from __future__ import annotations

import math

import pytest
import torch
from noise_laws import KS_LIMIT, Z_LIMIT, ks, laplace_cdf

from dpfa_kernels_torch.noise.laplace import laplace53


def words(n: int) -> torch.Tensor:
    return torch.randint(0, 2**32, (n, 4), generator=torch.Generator().manual_seed(3))


def test_law() -> None:
    sample = laplace53(words(100_000))
    assert ks(sample, laplace_cdf) < KS_LIMIT
    signs = sample.sign()
    assert abs(float(signs.sum())) / math.sqrt(signs.numel()) < Z_LIMIT


def test_law_check_sees_a_scale_two_percent_short() -> None:
    assert ks(0.98 * laplace53(words(400_000)), laplace_cdf) > KS_LIMIT


def test_flipping_the_last_bit_flips_the_sign_alone() -> None:
    sample = words(1000)
    flipped = sample.clone()
    flipped[:, [0, 2]] ^= 1
    assert torch.equal(laplace53(sample), -laplace53(flipped))


def test_no_word_gives_zero_and_the_end_is_54_halvings() -> None:
    extremes = torch.tensor([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF]])
    largest, smallest = laplace53(extremes)[0].tolist()
    assert largest == pytest.approx(54 * math.log(2), rel=1e-14)
    assert smallest == pytest.approx(-(2.0**-54), rel=1e-14)
