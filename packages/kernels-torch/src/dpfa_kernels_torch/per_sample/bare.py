"""A parameter whose gradient in each sample is there as a tensor: saved = (it [B, *shape],)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_kernels_torch.per_sample.rule import Rule

WIDEST = 128
"""Numbers whose squares are summed in float32, with a margin of 4e-6 of the norm; sums of such sums are float64."""


def sqnorm(saved: tuple[Any, ...], method: str) -> Tensor:
    """The squares' sum from above: of the given numbers, which are exactly those that ``clipped_grad`` adds up."""
    (gradient,) = saved
    flat = gradient.unsqueeze(1).flatten(1)
    if flat.dtype != torch.float32:
        return flat.double().square().sum(1) * (1.0 + flat.shape[1] * 2.0**-52)
    width = flat.shape[1]
    columns = next((n for n in range(min(width, WIDEST), 0, -1) if width % n == 0), 1)
    if columns < 16 and columns < width:  # no useful divisor: a prime number of columns, say
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square() * (1.0 + width * 2.0**-52)
    norms = torch.linalg.vector_norm(flat.view(len(flat), width // columns, columns), dim=2).double()
    # n roundings in a sum of n squares and one of the root, in units of 2**-24; a tiny square may vanish
    slack = 1.0 + (columns + 4) * 1.01 * 2.0**-24
    return norms.square().sum(1) * slack + width * 2.0**-126


def clipped_grad(saved: tuple[Any, ...], factors: Tensor) -> Tensor:
    """sum_i factors[i] * gradient_i."""
    (gradient,) = saved
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    flat = gradient.unsqueeze(1).flatten(1).to(dtype)
    return (factors.to(dtype) @ flat).view(gradient.shape[1:])


RULE = Rule(sqnorm, clipped_grad, gradient=lambda saved: saved[0])
