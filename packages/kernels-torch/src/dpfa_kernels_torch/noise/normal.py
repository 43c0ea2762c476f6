"""Box-Muller from counter words: 32- and 53-bit radii."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def minus_log_uniform(x: Tensor, bits: int) -> Tensor:
    """-ln((x + 1/2) / 2**bits) > 0 for integers 0 <= x < 2**bits, bits <= 53, in float64.

    Next to u = 1 the uniform itself has too few digits: the upper half takes log1p of 1 - u, which is
    exact. So no value of x gives a radius of zero.
    """
    complement = (1 << bits) - 1 - x
    # The distance to the nearer end of (0, 1): exact, because it has at most 53 bits and the half.
    tail = torch.minimum(x, complement).to(torch.float64).add_(0.5).mul_(0.5**bits)
    return torch.where(x < complement, torch.log(tail), torch.log1p(-tail)).neg_()


def top53(low: Tensor, high: Tensor) -> Tensor:
    """The top 53 bits of high * 2**32 + low."""
    return (high << 21) | (low >> 11)


def bm32(words: Tensor) -> Tensor:
    """Two standard normals of each pair of words (radius, angle); they end at 6.76.

    Guarantee: tested (chi-square, KS, extreme words).
    Args: words: int64 [..., 2], 32-bit words.
    Returns: float64 [..., 2].
    """
    return _polar(minus_log_uniform(words[..., 0], 32), words[..., 1])


def bm64(words: Tensor) -> Tensor:
    """Two standard normals of four words (radius low, radius high, angle, unused); they end at 8.65.

    Guarantee: tested (chi-square, KS, extreme words).
    Args: words: int64 [..., 4], 32-bit words.
    Returns: float64 [..., 2].
    """
    radius = minus_log_uniform(top53(words[..., 0], words[..., 1]), 53)
    return _polar(radius, words[..., 2])


def _polar(exponential: Tensor, angle_word: Tensor) -> Tensor:
    radius = exponential.mul_(2.0).sqrt_()
    # The angle from the signed word: the same direction, and no digits lost next to a full turn.
    angle = angle_word.to(torch.int32).to(torch.float64).mul_(2.0 * math.pi * 0.5**32)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
