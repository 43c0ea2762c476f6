"""The delta that a sampler with a last value costs (PRIVACY P10).

A Box-Muller pair made from finitely many bits never leaves a disc. Where the disc of one dataset and the
shifted disc of its neighbour do not overlap, an output tells them apart, whatever the noise multiplier.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpfa_core.checks import integer, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem

RADII = {
    ("bfloat16", 32): 6.4,
    ("float16", 32): 6.0,
    ("float32", 32): 4.1,
    ("bfloat16", 53): 8.4,
    ("float16", 53): 8.2,
    ("float32", 53): 6.9,
}
"""Where the gaps between the sampler's radii exceed the rounding step of the output."""

RINGS = 2048
SHIFTS = 1024
DECADES = 13


def tail_radius(dtype: str, bits: int) -> float:
    """The radius, in noise stds, at which the Gaussian sampler counts as ended.

    Guarantee: tested (no gap between radii is wider there than a rounding step).
    Args: `dtype` of the released output; `bits` of the radius: 32 for "bm32", 53 for "bm64".
    Raises: PrivacyParameterError for a pair without a radius, float64 among them.
    Source: PRIVACY P10.
    """
    known = ", ".join(f"{name} with {count} bits" for name, count in RADII)
    require((dtype, bits) in RADII, f"a tail radius is known for {known}", (dtype, bits))
    return RADII[dtype, bits]


def released_numbers(problem: AttentionProblem) -> int:
    """How many released numbers one record can touch: all of one batch row, in pairs of columns.

    Guarantee: tested. An upper bound for the token unit, whose record reaches fewer rows under a window.
    """
    rows = max((pair[0] for pair in problem.lengths), default=problem.q_len)
    return rows * problem.q_heads * 2 * math.ceil(problem.head_dim / 2)


def delta_with_tail(delta: float, *, noise_multiplier: float, numbers: int, radius: float) -> float:
    """An upper bound of one release's delta, if ideal Gaussian noise has `delta` and the sampler ends.

    Guarantee: tested (against the integral, and against 1-d and one-pair attacks).
    Args: `numbers` one record can touch, `radius` in noise stds where the sampler ends.
    Source: PRIVACY P10.
    """
    require(0 <= delta <= 1, "delta must be in [0, 1]", delta)
    tail = gaussian_tail(noise_multiplier, numbers=numbers, radius=radius)
    whole = _untouched(numbers, radius)
    return min(1.0, delta / whole * (1.0 + 2.0**-40) + tail) if whole > 0 else 1.0


def delta_after_tail(delta: float, *, noise_multiplier: float, numbers: int, radius: float) -> float:
    """The delta left for calibration once the tail is charged.

    Guarantee: tested (``delta_with_tail`` of what is left is at most `delta`).
    Args: `noise_multiplier`: any that the release will not go below, such as the one calibrated for the
    whole `delta`; the final one is larger and its tail smaller.
    Raises: PrivacyParameterError if the tail alone costs `delta` or more.
    Source: PRIVACY P10.
    """
    tail = gaussian_tail(noise_multiplier, numbers=numbers, radius=radius)
    left = (delta - tail) * _untouched(numbers, radius) * (1.0 - 2.0**-40)
    if left <= 0:
        raise PrivacyParameterError(
            f"delta must exceed {tail:.3g}, the cost of a sampler that ends at {radius} stds for {numbers} "
            f"numbers at noise multiplier {noise_multiplier:.4g}, got {delta:.3g}; raise delta, "
            "lower epsilon, or release in a dtype whose sampler reaches further."
        )
    return left


def gaussian_tail(noise_multiplier: float, *, numbers: int, radius: float) -> float:
    """The part of delta that no epsilon buys back: mass where the neighbour's sampler cannot reach.

    The record moves `numbers` values by at most 1 / noise_multiplier stds in all, in pairs of columns. How
    it spreads the move over the pairs is its choice, so the cost of one pair enters by its least concave
    majorant.

    Guarantee: tested (against quadrature and against evenly spread moves).
    Args: as ``delta_with_tail``.
    Source: PRIVACY P10.
    """
    positive("noise_multiplier", noise_multiplier)
    integer("numbers", numbers, least=2)
    positive("radius", radius)
    if 1.0 / noise_multiplier >= radius:
        return 1.0
    pairs, most = math.ceil(numbers / 2), noise_multiplier**-2.0
    shifts, costs = _pair_costs(most, radius)
    return min(1.0, pairs * _majorant(shifts, costs, most / pairs))


def laplace_tail(noise_multiplier: float, *, end: float) -> float:
    """The delta of Laplace noise that ends at `end` scales; everywhere else epsilon stays pure.

    A coordinate moved by s leaves the other's support with probability (e^s - 1) e^-end / (2 - 2 e^-end),
    convex in s: the worst record moves one number by all of 1 / noise_multiplier.

    Guarantee: tested (against quadrature).
    Args: `end` of the sampler in units of its scale; (k + 1) ln 2 for k uniform bits, at the most.
    Source: PRIVACY P4, P10.
    """
    positive("noise_multiplier", noise_multiplier)
    positive("end", end)
    moved = min(1.0 / noise_multiplier, end)
    return 0.5 * math.exp(-end) * math.expm1(moved) / -math.expm1(-end) * (1.0 + 2.0**-40)


def _untouched(numbers: int, radius: float) -> float:
    """Probability that ideal noise keeps all its pairs within the radius."""
    return math.exp(math.ceil(numbers / 2) * math.log1p(-math.exp(-radius * radius / 2.0)))


@lru_cache(maxsize=64)
def _pair_costs(most: float, radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared shifts from nearly 0 to `most`, and an upper bound of one pair's cost up to the next shift."""
    shifts = np.concatenate([[0.0], most * np.logspace(-DECADES, 0, SHIFTS)])
    costs = np.array([_pair_cost(float(shift), radius) for shift in shifts[1:]])
    # the cost grows with the shift: what holds at the next grid point holds before it
    return shifts, np.concatenate([costs, costs[-1:]])


def _pair_cost(shift: float, radius: float) -> float:
    """Upper bound of Pr[|z + d| > radius given |z| <= radius], z in the plane, |d|**2 = shift."""
    if shift >= radius * radius:
        return 1.0
    length = math.sqrt(shift)
    edges = np.linspace(max(0.0, radius - length), radius, RINGS + 1)
    inner, outer = edges[:-1], edges[1:]
    mass = np.exp(-inner * inner / 2.0) * -np.expm1(-(outer - inner) * (outer + inner) / 2.0)
    # on one circle the outside is an arc, and it grows with the circle
    cosine = ((radius - outer) * (radius + outer) - shift) / (2.0 * outer * length)
    arc = np.arccos(np.clip(cosine, -1.0, 1.0)) / math.pi
    return float(np.dot(mass, arc)) / -math.expm1(-radius * radius / 2.0) * (1.0 + 1e-9)


def _majorant(x: NDArray[np.float64], y: NDArray[np.float64], at: float) -> float:
    """The least concave function above the points, at `at`: the upper hull."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1 and _below(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return float(np.interp(at, [p[0] for p in hull], [p[1] for p in hull]))


def _below(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> bool:
    return (middle[1] - left[1]) * (right[0] - left[0]) <= (right[1] - left[1]) * (middle[0] - left[0])
