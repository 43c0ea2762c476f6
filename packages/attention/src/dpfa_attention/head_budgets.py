"""A promise shared by heads that differ in noise (PRIVACY P6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpfa_core.checks import require
from dpfa_core.contracts import Mechanism
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Composed, Event, Gaussian, Laplace
from dpfa_mechanisms.allocation import by_epsilons
from dpfa_mechanisms.gaussian import gaussian_epsilon

ROUND_UP = 1.0 + 2.0**-46
"""Covers the sum over heads, its root and two products."""


@dataclass(frozen=True)
class HeadBudgets:
    """How the noise multiplier of a whole release is shared by its heads."""

    noise: Literal["gaussian", "laplace"]
    ratios: tuple[float, ...]
    """A head's own noise multiplier over that of the release, rounded up; 0 for a head without noise."""
    epsilon: float
    """What the heads with noise may cost together."""
    alone: tuple[float, ...] = ()
    """What each head may cost by itself, where the list came without a total."""

    def least(self, mechanism: Mechanism, delta: float) -> float:
        """The noise multiplier of the release with which no head costs more at `delta` than the list allows."""
        needed = [
            mechanism.calibrate(epsilon, delta) / ratio * ROUND_UP
            for epsilon, ratio in zip(self.alone, self.ratios, strict=False)
            if ratio
        ]
        return max(needed, default=0.0)

    @property
    def complete(self) -> bool:
        """Every head has noise."""
        return all(self.ratios)

    def multipliers(self, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multipliers of the heads, each relative to the sensitivity of one head."""
        return tuple(noise_multiplier * ratio for ratio in self.ratios)

    def event(self, mechanism: Mechanism, noise_multiplier: float) -> Event:
        """One record touches all heads: their releases compose."""
        return Composed(tuple(mechanism.event(part) for part in self.multipliers(noise_multiplier) if part))

    def epsilons(self, noise_multiplier: float, delta: float) -> tuple[float, ...]:
        """What each head costs alone at `delta`, rounded up; infinite without noise."""
        return tuple(_alone(self.noise, part, delta) for part in self.multipliers(noise_multiplier))


def as_numbers(head_epsilons: Any) -> tuple[float, ...] | None:
    """The list as a tuple; what it holds is checked where it is shared out."""
    if head_epsilons is None:
        return None
    good = isinstance(head_epsilons, Sequence) and not isinstance(head_epsilons, str | bytes)
    require(good, "head_epsilons must be None or a list with one number for each head", type(head_epsilons).__name__)
    return tuple(head_epsilons)


def head_budgets(
    mechanism: Mechanism,
    head_epsilons: tuple[float, ...],
    epsilon: float,
    delta: float,
    *,
    heads: int,
    allow_infinite: bool,
) -> HeadBudgets:
    """The list read as P6 says: with a finite `epsilon` it fixes ratios, with inf it is what each head costs.

    Guarantee: tested.
    Raises: PrivacyParameterError for a list that does not fit, an infinite entry that was not allowed, or noise
    whose heads nobody knows how to compose.
    Source: PRIVACY P6.
    """
    noise = _noise(mechanism)
    total = epsilon if math.isfinite(epsilon) else None
    by_epsilons(head_epsilons, delta, allow_infinite=allow_infinite, heads=heads, mechanism=noise)
    noisy = [value for value in head_epsilons if math.isfinite(value)]
    shared = by_epsilons(noisy, delta, epsilon=total, mechanism=noise)
    power = 1.0 if noise == "laplace" else 2.0
    inverse = math.fsum(part**-power for part in shared.noise_multipliers) ** (1.0 / power) * ROUND_UP
    found = iter([part * inverse for part in shared.noise_multipliers])
    ratios = tuple(next(found) if math.isfinite(value) else 0.0 for value in head_epsilons)
    return HeadBudgets(noise, ratios, shared.epsilon, head_epsilons if total is None else ())


def _noise(mechanism: Mechanism) -> Literal["gaussian", "laplace"]:
    event = mechanism.event(1.0)
    if isinstance(event, Gaussian):
        return "gaussian"
    if isinstance(event, Laplace):
        return "laplace"
    raise PrivacyParameterError(
        f"head_epsilons must go with gaussian or laplace noise, got mechanism {mechanism.name!r}; leave them out."
    )


def _alone(noise: Literal["gaussian", "laplace"], multiplier: float, delta: float) -> float:
    if not multiplier:
        return math.inf
    return math.nextafter(1.0 / multiplier, math.inf) if noise == "laplace" else gaussian_epsilon(multiplier, delta)
