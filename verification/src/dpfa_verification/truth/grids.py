"""Noise on a grid: what one number costs, summed over the grid."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

REACH = 14.0
"""In scales: beyond lies less than 1e-42."""


def _logarithms(steps: int, scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of a discrete Gaussian on the integers, and of the same law moved by `steps`."""
    reach = math.ceil(REACH * scale) + 2 * steps + 1
    k = np.arange(-reach, reach + 1, dtype=np.float64)
    whole = math.log(float(np.exp(-(k**2) / (2.0 * scale**2)).sum()))
    return -(k**2) / (2.0 * scale**2) - whole, -((k - steps) ** 2) / (2.0 * scale**2) - whole


def discrete_gaussian(epsilon: float, steps: int, scale: float) -> float:
    """Delta at `epsilon` of one number that a record moves by `steps`, under noise of `scale`, both in grid steps."""
    here, moved = _logarithms(steps, scale)
    ahead = moved > here + epsilon
    return float((np.exp(moved[ahead]) * -np.expm1(here[ahead] + epsilon - moved[ahead])).sum())


def divergence(order: float, steps: int, scale: float) -> float:
    """The Renyi divergence of the two laws, of an order in (1, 2]."""
    here, moved = _logarithms(steps, scale)
    terms = order * moved + (1.0 - order) * here
    top = float(terms.max())
    return (top + math.log(float(np.exp(terms - top).sum()))) / (order - 1.0)
