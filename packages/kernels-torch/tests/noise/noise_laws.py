"""Distances between a sample and a law, and the limits that a true sample passes but once in a million."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

KS_LIMIT = math.sqrt(-0.5 * math.log(1e-6 / 2))
Z_LIMIT = 4.9


def ks(sample: torch.Tensor, cdf: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """sqrt(n) times the largest distance between the sample's distribution function and `cdf`."""
    values = cdf(sample.double().flatten().sort().values)
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((values - steps[:-1]).abs().max(), (steps[1:] - values).abs().max())
    return float(distance) * math.sqrt(n)


def chi_square(sample: torch.Tensor) -> float:
    """Standardised sum of squares of what should be standard normals: about N(0, 1) for many values."""
    squares = sample.double().square().sum()
    return float((squares - sample.numel()) / math.sqrt(2 * sample.numel()))


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """sqrt(n) times the mean product of two standardised samples: about N(0, 1) if they are independent."""
    n = left.numel()
    return float((left.double().flatten() * right.double().flatten()).sum() / math.sqrt(n))


def laplace_cdf(x: torch.Tensor) -> torch.Tensor:
    tail = 0.5 * torch.exp(-x.abs())
    return torch.where(x < 0, tail, 1 - tail)
