"""Divergences that grow in proportion to the order (zero-concentrated privacy), converted at the best of all orders.

With y = order - 1 and the divergence rho * order, Proposition 12 of Canonne, Kamath & Steinke 2020 reads
epsilon = rho (1 + y) + (log(1 / delta) - log(1 + y)) / y - log(1 + 1 / y). Any y > 0 gives a valid bound, so the
search for the best one cannot cost privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def epsilon(rho: float, delta: float) -> float:
    """Epsilon at 0 < `delta` < 1, rounded up."""
    if rho == math.inf:
        return math.inf
    if delta * delta >= -math.expm1(-rho):
        # total variation is at most sqrt(1 - exp(-divergence)) (Bretagnolle & Huber)
        return 0.0
    wanted = -math.log(delta)
    y = _root(lambda y: rho * y * y + math.log1p(y) - wanted)
    terms = (rho, rho * y, wanted / y, -math.log1p(y) / y, -math.log1p(1.0 / y))
    return max(0.0, _up(math.fsum(terms), terms))


def delta(rho: float, epsilon: float) -> float:
    """Delta at `epsilon`, rounded up."""
    if rho == math.inf:
        return 1.0
    y = _root(lambda y: rho + 2.0 * rho * y - epsilon - math.log1p(1.0 / y))
    terms = (rho * y, rho * y * y, -epsilon * y, -y * math.log1p(1.0 / y), -math.log1p(y))
    least = 5e-324
    if math.isfinite(sum(map(abs, terms))):
        exponent = _up(math.fsum(terms), terms)
        least = max(least, math.exp(exponent)) if exponent < 0 else 1.0
    else:
        # the search left the range of float64; order 2 is as good as any
        least = max(least, math.exp(min(0.0, 2.0 * rho - epsilon))) if epsilon > 2.0 * rho else 1.0
    return min(1.0, least, math.sqrt(-math.expm1(-rho)) * (1.0 + 2.0**-40) + 5e-324)


def _up(value: float, terms: tuple[float, ...]) -> float:
    return value + 2.0**-48 * math.fsum(map(abs, terms))


def _root(rising: Callable[[float], float]) -> float:
    """About where `rising` crosses zero, for an argument > 0."""
    low, high = -690.0, 690.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rising(math.exp(middle)) < 0 else (low, middle)
    return math.exp(high)
