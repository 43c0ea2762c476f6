"""The law of the exponential mechanism, and what a sample of picks says about a law or a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from dpfa_verification.truth.statistics import ALPHA, NORMAL_LIMIT

RARE = 5.0
"""Classes with a smaller expected count are put together."""


def exponential(scores: Sequence[float], sensitivity: float, epsilon: float) -> NDArray[np.float64]:
    """Probabilities in proportion to exp(epsilon score / (2 sensitivity))."""
    exponents = epsilon * (np.array(scores, dtype=np.float64) - max(scores)) / (2.0 * sensitivity)
    weights = np.exp(exponents)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def agrees(counts: NDArray[np.int64], law: NDArray[np.float64]) -> bool:
    """Chi-square: true counts are rejected with a probability of about ALPHA."""
    expected = law * counts.sum()
    rare = expected < RARE
    found, wanted = list(counts[~rare]), list(expected[~rare])
    if expected[rare].sum() >= RARE:
        found.append(counts[rare].sum())
        wanted.append(expected[rare].sum())
    elif counts[rare].sum() > expected[rare].sum() + math.sqrt(RARE) * NORMAL_LIMIT + NORMAL_LIMIT**2:
        return False
    if len(wanted) < 2:
        return True
    distance = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    return bool(distance <= chdtri(len(wanted) - 1, ALPHA))


def excess(one: NDArray[np.int64], other: NDArray[np.int64], epsilon: float) -> tuple[float, int]:
    """How far, in standard deviations, a candidate's count exceeds exp(epsilon) times that of a neighbour.

    Both samples have the same size. Returns: the largest excess, and the candidate that has it.
    """
    factor = math.exp(epsilon)
    spread = np.sqrt(np.maximum(one + factor**2 * other, 1.0))
    far = (one - factor * other) / spread
    return float(far.max()), int(far.argmax())
