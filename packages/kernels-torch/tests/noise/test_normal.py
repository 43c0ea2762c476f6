"""Box-Muller: values against exact rationals, the law, the ends of the range."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dpfa_kernels_torch.noise.normal import bm32, bm64, minus_log_uniform


@pytest.mark.parametrize("bits", [32, 53])
def test_minus_log_is_exact_to_rounding(bits: int) -> None:
    """Against log1p of the exact rational distance to the nearer end."""
    full = 1 << bits
    values = [0, 1, 2, 12345, full // 3, full // 2 - 1, full // 2, full // 2 + 1, full - 2, full - 1]
    computed = minus_log_uniform(torch.tensor(values), bits).tolist()
    for x, found in zip(values, computed, strict=True):
        u = Fraction(2 * x + 1, 2 * full)
        expected = -math.log1p(-float(1 - u)) if 2 * x >= full else -math.log(float(u))
        assert found == pytest.approx(expected, rel=1e-15)
        assert found > 0


@pytest.mark.parametrize(("bits", "transform", "width"), [(32, bm32, 2), (53, bm64, 4)])
def test_no_word_gives_zero_noise_and_the_end_is_where_documented(bits: int, transform: object, width: int) -> None:
    """The naive uniform rounds to 1 next to the end and would give two exact zeros."""
    ones = torch.full((width,), 0xFFFFFFFF)
    ones[-1 if width == 2 else 2] = 0x20000000
    assert (transform(ones) > 0).all()
    zeros = torch.zeros(width, dtype=torch.int64)
    assert transform(zeros)[0].item() == pytest.approx(math.sqrt(2 * (bits + 1) * math.log(2)), rel=1e-14)


def test_naive_single_precision_uniform_has_the_atom_that_this_one_lacks() -> None:
    x = torch.arange(2**32 - 128, 2**32)
    naive = ((x.to(torch.float32) + 0.5) * 2.0**-32).log()
    assert (naive == 0).all()
    assert (minus_log_uniform(x, 32) > 0).all()


def test_angle_is_cosine_then_sine_of_the_signed_word() -> None:
    for word in (0, 1, 2**30, 2**31, 2**31 + 5, 2**32 - 1):
        radius = math.sqrt(-2 * math.log((12345.5) * 2.0**-32))
        pair = bm32(torch.tensor([12345, word]))
        angle = 2 * math.pi * word / 2**32
        assert pair.tolist() == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], abs=1e-14)


def test_bm64_radius_takes_the_top_53_bits_and_ignores_the_fourth_word() -> None:
    words = torch.tensor([0x12345678, 0x9ABCDEF0, 77, 0])
    other = torch.tensor([0x12345678 ^ 0x7FF, 0x9ABCDEF0, 77, 0xFFFFFFFF])
    assert torch.equal(bm64(words), bm64(other))
    x = ((0x9ABCDEF0 << 32) | 0x12345678) >> 11
    radius = math.sqrt(-2 * math.log1p(-float(1 - Fraction(2 * x + 1, 2**54))))
    assert bm64(words).norm().item() == pytest.approx(radius, rel=1e-14)
