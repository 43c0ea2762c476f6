"""The discrete Gaussian on the integers, sampled exactly from uniform random bytes."""

from __future__ import annotations

import math
from fractions import Fraction

from dpfa_core.checks import require
from dpfa_mechanisms.bernoulli import RandomBits, bernoulli_exp, uniform_below


def integer_gaussian(variance: Fraction, random_bits: RandomBits) -> int:
    """An integer k with probability proportional to exp(-k**2 / (2 variance)).

    Guarantee: tested (chi-square).
    Args: `variance` > 0, the parameter sigma**2 of the law; its own variance is at most that.
    Source: Canonne, Kamath & Steinke 2020, Algorithm 3.
    """
    require(variance > 0, "variance must be > 0", variance)
    # floor(sigma) + 1, by integers
    scale = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:
        proposal = integer_laplace(scale, random_bits)
        if bernoulli_exp((abs(proposal) - variance / scale) ** 2 / (2 * variance), random_bits):
            return proposal


def integer_laplace(scale: int, random_bits: RandomBits) -> int:
    """An integer k with probability proportional to exp(-abs(k) / scale).

    Guarantee: tested (chi-square).
    Source: Canonne, Kamath & Steinke 2020, Algorithm 2.
    """
    while True:
        low = uniform_below(scale, random_bits)
        if not bernoulli_exp(Fraction(low, scale), random_bits):
            continue
        high = 0
        while bernoulli_exp(Fraction(1), random_bits):
            high += 1
        size = low + scale * high
        negative = uniform_below(2, random_bits) == 1
        # zero has one sign only
        if not (negative and size == 0):
            return -size if negative else size
