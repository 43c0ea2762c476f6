"""Distances between a sample and a law, and the limits that a true sample passes but once in a million."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Sample = NDArray[np.float64]

ALPHA = 1e-6
NORMAL_LIMIT = float(-ndtri(ALPHA / 2))
KS_LIMIT = math.sqrt(-0.5 * math.log(ALPHA / 2))


def kolmogorov(sample: Sample, distribution: Callable[[Sample], Sample]) -> float:
    """sqrt(n) times the largest distance from the distribution function; exceeds KS_LIMIT with ALPHA or less."""
    values = distribution(np.sort(sample))
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.max(values - steps[:-1]), np.max(steps[1:] - values))) * math.sqrt(len(values))


def standardised(sample: Sample, mean: float, std: float) -> float:
    """How many of its own standard deviations the sample's mean lies from `mean`."""
    return float((np.mean(sample) - mean) / std) * math.sqrt(len(sample))


def correlation(left: Sample, right: Sample) -> float:
    """The same for the mean product of two independent samples of unit variance."""
    return float(np.dot(left, right)) / math.sqrt(len(left))


def repeated_pairs(pairs: Sample) -> int:
    """How many rows of [n, 2] occur more than once, whatever their order and signs."""
    canonical = np.sort(np.abs(pairs), axis=1)
    return len(canonical) - len(np.unique(canonical, axis=0))


def laplace_distribution(x: Sample) -> Sample:
    tail = 0.5 * np.exp(-np.abs(x))
    return np.where(x < 0, tail, 1 - tail)
