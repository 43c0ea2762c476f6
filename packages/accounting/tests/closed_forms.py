"""Closed forms that the accountants are measured against."""

from __future__ import annotations

import math

import mpmath
import numpy as np
from numpy.typing import NDArray


def gaussian_delta(epsilon: float, mu: float) -> mpmath.mpf:
    with mpmath.workdps(60 + int(epsilon)):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return _tail(e / m - m / 2) - mpmath.exp(e) * _tail(e / m + m / 2)


def poisson_delta(epsilon: float, q: float, sigma: float) -> mpmath.mpf:
    """One Poisson-sampled Gaussian, the worse of both directions."""
    with mpmath.workdps(60):
        p, s, grown = mpmath.mpf(q), mpmath.mpf(sigma), mpmath.exp(mpmath.mpf(epsilon))
        cut = s**2 * mpmath.log((grown - 1 + p) / p) + mpmath.mpf(1) / 2
        removed = (1 - p - grown) * _tail(cut / s) + p * _tail((cut - 1) / s)
        added = mpmath.mpf(0)
        if 1 / grown > 1 - p:
            cut = s**2 * mpmath.log((1 / grown - 1 + p) / p) + mpmath.mpf(1) / 2
            low, shifted = 1 - _tail(cut / s), 1 - _tail((cut - 1) / s)
            added = low - grown * ((1 - p) * low + p * shifted)
        return max(removed, added)


def fixed_size_delta(epsilon: float, q: float, sigma: float) -> float:
    """A lower bound for one fixed-size sample: a record at +1/2 is replaced by one at -1/2."""
    x, step = np.linspace(-12 * sigma - 1, 12 * sigma + 1, 100_001, retstep=True)

    def density(centre: float) -> NDArray[np.float64]:
        mixed = (1 - q) * np.exp(-((x / sigma) ** 2) / 2) + q * np.exp(-(((x - centre) / sigma) ** 2) / 2)
        return np.asarray(mixed / (sigma * math.sqrt(2 * math.pi)))

    excess = np.clip(density(0.5) - math.exp(epsilon) * density(-0.5), 0.0, None)
    return float(excess.sum() * step) * (1 - 1e-6)


def _tail(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2
