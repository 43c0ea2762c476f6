"""Randomised response over k answers: its own loss, not that of the worst release with the same epsilon.

With b = p / k and a = 1 - p + b, the own answer comes with probability a, each other one with b. Two records
differ in two answers only. The price is for replacing a record; it also holds for adding or removing one if an
absent record answers like some present one, or uniformly: the uniform answer is the average over all records,
and divergences are quasi-convex.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpfa_core.events import RandomizedResponse

Curve = NDArray[np.float64]

ROUND_OFF = 1e-14
"""Relative error granted to a divergence and to epsilon."""


def epsilon(event: RandomizedResponse) -> float:
    """log(a / b), rounded up; 0 if the answer is always uniform."""
    p, k = event.noise_parameter, event.num_buckets
    if p == 1:
        return 0.0
    ratio = (1.0 - p) * k / p
    value = math.log1p(ratio) if ratio < math.inf else math.log1p(-p) + math.log(k) - math.log(p)
    return value * (1.0 + ROUND_OFF)


def curve(event: RandomizedResponse, orders: Curve) -> Curve:
    """Renyi divergence at `orders`: log(a**s b**(1-s) + b**s a**(1-s) + (k-2) b) / (s-1), rounded up."""
    loss = epsilon(event)
    other = event.noise_parameter / event.num_buckets
    return divergence(loss, 1.0 - event.noise_parameter + other, other, orders)


def divergence(loss: float, own: float, other: float, orders: Curve) -> Curve:
    """Divergence of two answers that swap `own` and `other` = own * exp(-loss); the remaining mass is common."""
    grown = (orders - 1.0) * loss
    near = np.minimum(grown, 30.0)
    # own (e^t - 1) + other (e^-t - 1) with t = grown: 0 at t = 0 and exact near it
    small = np.log1p(own * np.expm1(near) + other * np.expm1(-near))
    large = grown + math.log(own) + np.exp(-near) / own
    value = np.where(grown <= 30.0, small, large)
    margin = 1e-15 + ROUND_OFF * value
    pure = np.minimum(loss, orders * min(loss, 1e150) ** 2 / 2.0 if loss < 1e150 else loss)
    return np.asarray(np.minimum(pure * (1.0 + ROUND_OFF), (value + margin) / (orders - 1.0)))
