"""Renyi divergence of one round of balls in bins around a Gaussian.

A record falls into one of b batches; each batch is released with noise z. Without the record the b outputs are
noise Q; with it they are P, and P / Q is the mean W of w_1 .. w_b, where w_j = exp((x_j - 1/2) / z**2) and the
x_j ~ N(0, z**2) are independent under Q. Batches chosen after earlier outputs give W the same law, since each x_j
is drawn after its batch is known; smaller contributions are a post-processing of full ones.

Removing: E[W**a] = a! / b**a [t**a] (sum_k t**k / k! exp((k**2 - k) / (2 z**2)))**b at integer a, exactly.
Adding: E[W**-s], s = a - 1, is the integral of t**(s-1) E[exp(-t w / b)]**b / Gamma(s) over t > 0, exactly; and by
the inequality of means, W >= (w_1 .. w_b)**(1/b), so the divergence is at most 1 / (2 z**2) + s / (2 b z**2).
log E[W**a] is convex in a, so what lies between two integers is interpolated.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

Curve = NDArray[np.float64]

LARGEST_ORDER = 256
"""Beyond it, the bound without bins is used."""

MARGIN = 1e-11
"""Granted to each logarithm of a moment, beside RELATIVE of it; measured against 80 digits: 2e-11 in 1e5."""

RELATIVE = 1e-13


def curve(noise_multiplier: float, bins: int, orders: Curve) -> Curve:
    """Divergence of one round at each of `orders`, the larger of both directions, rounded up."""
    unsampled = orders * (0.5 / noise_multiplier / noise_multiplier)
    if not 1e-2 <= noise_multiplier <= 1e3:
        return np.asarray(unsampled)
    integers = np.arange(1, LARGEST_ORDER + 1)
    moments = np.maximum(_removed(noise_multiplier, bins), _added(noise_multiplier, bins))
    moments[1:] += MARGIN + bins * 1e-15
    inside = orders <= LARGEST_ORDER
    found = np.interp(orders, integers, moments) / (orders - 1.0) * (1.0 + RELATIVE)
    return np.asarray(np.where(inside, np.minimum(found, unsampled), unsampled))


@lru_cache(maxsize=256)
def _removed(noise_multiplier: float, bins: int) -> Curve:
    """log E[W**a] at a = 1 .. LARGEST_ORDER."""
    k = np.arange(LARGEST_ORDER + 1)
    # coefficients of (t / b)**k, so that the logarithms stay small
    power = (k * k - k) / (2.0 * noise_multiplier**2) - gammaln(k + 1.0) - k * math.log(bins)
    product, left = np.where(k == 0, 0.0, -np.inf), bins
    while left:
        if left & 1:
            product = _times(product, power)
        left >>= 1
        if left:
            power = _times(power, power)
    return np.asarray(np.maximum(0.0, (product + gammaln(k + 1.0))[1:]))


def _times(one: Curve, other: Curve) -> Curve:
    """Product of two polynomials, given by logarithms of their coefficients, cut at the largest order."""
    n = len(one)
    shift = np.arange(n)[:, None] - np.arange(n)[None, :]
    terms = np.where(shift >= 0, one[None, :] + other[np.maximum(shift, 0)], -np.inf)
    return np.asarray(logsumexp(terms, axis=1))


@lru_cache(maxsize=256)
def _added(noise_multiplier: float, bins: int) -> Curve:
    """log E[W**-s] at s = 0 .. LARGEST_ORDER - 1, each by the better of both ways."""
    s = np.arange(LARGEST_ORDER, dtype=np.float64)
    square = noise_multiplier**2
    means = s * (1.0 + s / bins) / (2.0 * square)
    return np.asarray(np.minimum(means, _by_laplace_transform(s, noise_multiplier, bins)))


def _by_laplace_transform(s: Curve, noise_multiplier: float, bins: int) -> Curve:
    """log E[W**-s] by the integral over v = log t, by the trapezoidal rule, exact to round-off; infinity where not.

    Both integrands are analytic in a strip, so the error of the rule falls exponentially in 1 / step. In units of
    their deviation y, the x_j that make W**-s large have a strongly log-concave density with its mode at
    -s / (b z): all but exp(-50) b of it lies on the grid of y if the mode is above -13.
    """
    step, most = 0.02, 80.0
    v = np.arange(-40.0, most, step)
    transform = bins * _log_transform(v - math.log(bins), noise_multiplier)
    exponent = s[1:, None] * v[None, :] + transform[None, :]
    # what is left of the grid: there the transform is at most 1
    left = -40.0 * s[1:] - np.log(s[1:])
    total = np.logaddexp(logsumexp(exponent, axis=1) + math.log(step), left) - gammaln(s[1:])
    # an integrand that has not died out at the end of the grid was not integrated
    unfinished = exponent[:, -1] > exponent.max(axis=1) - 60.0
    outside = s[1:] > 13.0 * bins * noise_multiplier
    return np.concatenate(([0.0], np.where(unfinished | outside, np.inf, total)))


def _log_transform(log_argument: Curve, noise_multiplier: float) -> Curve:
    """log E[exp(-u w)] at log u."""
    step = min(0.1, noise_multiplier / 8.0)
    y = np.arange(-24.0, 14.0, step)
    log_w = y / noise_multiplier - 0.5 / noise_multiplier**2
    weight = np.exp(-y * y / 2.0) * (step / math.sqrt(2.0 * math.pi))
    found = np.empty_like(log_argument)
    for part in np.array_split(np.arange(len(log_argument)), max(1, len(log_argument) * len(y) // 2**20)):
        product = np.exp(np.minimum(log_argument[part, None] + log_w[None, :], 50.0))
        # -expm1 keeps the digits of 1 - transform where u is small
        small = -np.expm1(-product) @ weight
        large = np.exp(-product) @ weight
        with np.errstate(divide="ignore"):
            found[part] = np.where(small < 0.5, np.log1p(-np.minimum(small, 0.5)), np.log(large))
    return found
