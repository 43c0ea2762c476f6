"""Laplace noise from counter words: a 53-bit exponential with a sign bit of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_kernels_torch.noise.normal import minus_log_uniform, top53


def laplace53(words: Tensor) -> Tensor:
    """Two standard Laplace variables (b = 1) of four words; they end at 37.4 and are never zero.

    The magnitude is -ln u on the top 53 bits of each 64, the sign is their lowest bit.

    Guarantee: tested (KS, symmetry, extreme words).
    Args: words: int64 [..., 4], 32-bit words.
    Returns: float64 [..., 2].
    """
    low, high = words[..., 0::2], words[..., 1::2]
    magnitude = minus_log_uniform(top53(low, high), 53)
    return torch.where((low & 1) == 1, -magnitude, magnitude)
