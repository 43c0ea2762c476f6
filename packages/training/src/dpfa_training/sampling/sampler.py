"""What every sampler answers: who takes part in which draw, and what one charge of that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

from dpfa_core.events import Event, Gaussian
from dpfa_core.spec import Relation
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.secret_bits import Indices


class Sampler(Protocol):
    """Who takes part in a draw is a function of (key, number of the draw) and of public numbers only.

    ``relation`` is the one that its amplification is proved for; ``steps_per_round`` draws share their random
    decisions, and ``event`` is the price of all of them.
    """

    relation: ClassVar[Relation]

    @property
    def population(self) -> int:
        """Units to draw from."""
        ...

    @property
    def sampling_probability(self) -> float:
        """Probability that a unit takes part in one draw, rounded up."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Draws in one pass of the loader."""
        ...

    @property
    def steps_per_round(self) -> int:
        """Draws that one charge pays for."""
        ...

    def event(self, release: Gaussian) -> Event:
        """What one round costs when every draw is released with the noise of `release`."""
        ...

    def units(self, keys: KeySource, draw: int) -> Indices:
        """The units that take part in draw number `draw`, in ascending order."""
        ...


@dataclass(frozen=True)
class PublicSizes:
    """The public numbers that all samplers share: `population` units, `expected_batch_size` of them in a draw."""

    population: int
    expected_batch_size: int

    @property
    def sampling_probability(self) -> float:
        """b / population, rounded up where it is not exact, so that accounting never uses less."""
        exact = Fraction(self.expected_batch_size, self.population)
        rounded = self.expected_batch_size / self.population
        return rounded if Fraction(rounded) >= exact else min(1.0, math.nextafter(rounded, 2.0))

    @property
    def steps_per_epoch(self) -> int:
        """Draws in which each unit takes part once in expectation, rounded up; whole-number arithmetic."""
        return -(-self.population // self.expected_batch_size)

    @property
    def steps_per_round(self) -> int:
        """One: each draw is decided on its own."""
        return 1
