"""The discrete Gaussian mechanism: noise on a grid, without the holes of floating point (PRIVACY P4)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from dpfa_core.checks import fraction, is_real, positive
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import DiscreteGaussian as DiscreteGaussianEvent
from dpfa_core.spec import AttentionProblem, Claim, NoisePlan, Norm, PrivacySpec, Reasons, Sensitivity
from dpfa_mechanisms.planning import noise_plan, release_reasons
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_mechanisms.tails import released_numbers

MARGIN = 0.01
"""The default grid widens the sensitivity by at most this share."""

TERM_ERROR = 2.0**-48
"""Covers the rounding of each term of the exponent: a few operations and logarithms in float64."""

MOST_EPSILON = 1e100
"""Noise for a larger epsilon is that for this one, more than is needed, so that squares stay finite."""

LEAST_RHO = 1e-150
"""A smaller one is rounded up to this, so that alpha stays finite."""

HALVINGS = 200
"""More than bisecting an interval of the positive float64 numbers takes."""


class DiscreteGaussian:
    """Gaussian noise on the multiples of `grid`; ``noise_multiplier`` = scale / widened l2 sensitivity.

    The output is rounded to the grid before the noise is added, which moves two neighbours apart by at most
    ``grid`` more in each number that a record can touch: the sensitivity is widened by that.

    Args: `grid`, a power of two in output units, so that its multiples and their sums are exact; None for the
    largest one that widens the sensitivity by at most 1 %.
    """

    contract_version = 1
    name = "discrete_gaussian"
    kind: Literal["additive", "selection"] = "additive"
    norm: Norm = "l2"

    def __init__(self, *, grid: float | None = None) -> None:
        self.grid = grid

    def supports(self, spec: PrivacySpec, problem: AttentionProblem) -> Reasons:
        """Reasons against; empty means that ``calibrate`` and ``plan`` hold for this release.

        Noise narrower than its grid would keep the promise, but rounds away what it should blur: refused.
        """
        reasons = release_reasons(spec, problem, self.norm)
        if spec.delta <= 0:
            reasons += (f"the discrete Gaussian needs delta > 0, got {spec.delta}; use laplace for delta = 0.",)
        wrong = self._wrong_grid()
        if wrong:
            return (*reasons, wrong)
        if not reasons and self.grid is not None:
            value = sensitivity(spec, problem, self.norm).value
            scale = self.calibrate(spec.epsilon, spec.delta) * widened(value, self.grid, problem)
            if scale < self.grid:
                reasons += (
                    f"grid must not exceed the noise, which has the scale {scale:.4g}, got {self.grid}; "
                    "a coarser grid is private but rounds most of the output away, so choose a finer one.",
                )
        return reasons

    def calibrate(self, epsilon: float, delta: float) -> float:
        """The least noise multiplier of one release that zero-concentrated privacy can prove, rounded up.

        ``concentrated_delta`` at the result is at most `delta`. The formula of the continuous Gaussian does
        not hold on a grid.

        Guarantee: tested (against 50 digits; delta of grids of one number summed exactly).
        Args: epsilon > 0 and finite, 0 < delta < 1.
        Raises: PrivacyParameterError.
        Source: Canonne, Kamath & Steinke 2020, Theorem 14 and Proposition 12.
        """
        positive("epsilon", epsilon, remedy="A release without noise has no noise multiplier.")
        fraction("delta", delta, zero=False, remedy="The discrete Gaussian has no delta = 0.")
        epsilon = min(epsilon, MOST_EPSILON)
        low = high = 1.0
        while concentrated_delta(epsilon, high) > delta:
            low, high = high, high * 2.0
        while low == high or concentrated_delta(epsilon, low) <= delta:
            low, high = low / 2.0, low
        while (middle := (low + high) / 2.0) not in (low, high):
            if concentrated_delta(epsilon, middle) <= delta:
                high = middle
            else:
                low = middle
        return high

    def event(self, noise_multiplier: float) -> DiscreteGaussianEvent:
        """The price of one release."""
        return DiscreteGaussianEvent(noise_multiplier)

    def plan(
        self, sensitivity: Sensitivity, noise_multipliers: tuple[float, ...], problem: AttentionProblem
    ) -> NoisePlan:
        """Scales in output units relative to the widened sensitivity, rounded up, and the grid.

        Raises: PrivacyParameterError for a grid that is not a power of two.
        """
        wrong = self._wrong_grid()
        if wrong:
            raise PrivacyParameterError(wrong)
        grid = default_grid(sensitivity.value, problem) if self.grid is None else self.grid
        wide = dataclasses.replace(sensitivity, value=widened(sensitivity.value, grid, problem))
        return noise_plan(self.name, "discrete_gaussian", self.norm, wide, noise_multipliers, problem, grid=grid)

    def claims(self) -> tuple[Claim, ...]:
        """What the verifier must discharge."""
        return (
            Claim("calibration", status="tested", source="Canonne, Kamath & Steinke 2020, Proposition 12"),
            Claim("sensitivity", status="tested", source="PRIVACY P3, P4: widened by grid * sqrt(released numbers)"),
            Claim(
                "noise_law",
                status="assumed",
                source="the backend rounds to the grid, then adds discrete Gaussian noise with the planned scale",
            ),
        )

    def _wrong_grid(self) -> str:
        if self.grid is None:
            return ""
        grid = self.grid
        if not is_real(grid) or not 0 < grid < math.inf:
            return f"grid must be a finite number > 0, got {grid!r}; None chooses one."
        if math.frexp(grid)[0] != 0.5:
            return (
                f"grid must be a power of two, so that its multiples are exact, got {grid!r}; "
                f"choose {2.0 ** (math.frexp(grid)[1] - 1)!r}."
            )
        return ""


def widened(value: float, grid: float, problem: AttentionProblem) -> float:
    """The sensitivity of an output that is rounded to the grid: ``value + grid * sqrt(N)``, rounded up.

    N is the count of numbers that one record can move; two neighbours' roundings differ by at most `grid` in
    each of them.

    Source: PRIVACY P4.
    """
    return (value + grid * math.sqrt(released_numbers(problem))) * (1.0 + 2.0**-50)


def default_grid(value: float, problem: AttentionProblem) -> float:
    """The largest power of two that widens a sensitivity of `value` by at most 1 %."""
    root = math.sqrt(released_numbers(problem))
    if value <= 0 or root == 0:
        return 2.0**-24
    grid = 2.0 ** math.frexp(MARGIN * value / root)[1]
    while widened(value, grid, problem) > (1.0 + MARGIN) * value:
        grid /= 2.0
    return grid


def concentrated_delta(epsilon: float, noise_multiplier: float) -> float:
    """An upper bound of one release's delta at `epsilon`, from rho = 1 / (2 noise_multiplier**2), rounded up.

    With t = alpha - 1 the logarithm of the bound is ``t ((1 + t) rho - epsilon) - t log(1 + 1/t) - log(1 + t)``.
    It is convex in t, so its slope, ``(2 t + 1) rho - epsilon - log(1 + 1/t)``, has one zero; the bound holds at
    every t, so that an inexact zero costs nothing but tightness.

    Guarantee: tested (against 50 digits).
    Args: epsilon >= 0, noise_multiplier > 0.
    Source: Canonne, Kamath & Steinke 2020, Proposition 12.
    """
    rho = max(0.5 / noise_multiplier / noise_multiplier * (1.0 + TERM_ERROR), LEAST_RHO)
    low, high = 0.0, (epsilon + 1.0) / rho + 1.0
    if not math.isfinite(rho + high):
        return 1.0
    for _ in range(HALVINGS):
        t = (low + high) / 2.0
        if t in (low, high):
            break
        if (2.0 * t + 1.0) * rho - epsilon - math.log1p(1.0 / t) < 0:
            low = t
        else:
            high = t
    terms = (t * (1.0 + t) * rho, -t * epsilon, -t * math.log1p(1.0 / t), -math.log1p(t))
    exponent = math.fsum(terms) + TERM_ERROR * math.fsum(map(abs, terms))
    return min(1.0, max(math.exp(min(exponent, 0.0)) * (1.0 + 2.0**-50), 2.0**-1022))
