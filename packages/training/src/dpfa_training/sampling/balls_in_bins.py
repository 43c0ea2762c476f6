"""Balls in bins: in each round every unit falls into exactly one of the round's batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dpfa_core.events import BallsInBins as BallsInBinsEvent
from dpfa_core.events import Event, Gaussian
from dpfa_core.spec import Relation
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.sampler import PublicSizes
from dpfa_training.sampling.secret_bits import Indices, uniform_below


@dataclass(frozen=True)
class BallsInBins(PublicSizes):
    """A round is an epoch of ``bins`` batches; each unit chooses its batch uniformly, independently of others.

    Source: Chua et al. 2024 (balls and bins).
    """

    relation: ClassVar[Relation] = "add_or_remove"

    @property
    def bins(self) -> int:
        """Batches in a round."""
        return self.steps_per_epoch

    @property
    def sampling_probability(self) -> float:
        """1 / bins, rounded up."""
        return PublicSizes(self.bins, 1).sampling_probability

    @property
    def steps_per_round(self) -> int:
        """All batches of a round share one decision for each unit, so they are charged together."""
        return self.bins

    def event(self, release: Gaussian) -> Event:
        """One round."""
        return BallsInBinsEvent(self.bins, 1, release, self.relation)

    def units(self, keys: KeySource, draw: int) -> Indices:
        """The units of batch ``draw % bins`` in round ``draw // bins``."""
        number, batch = divmod(draw, self.bins)
        return np.flatnonzero(uniform_below(keys, number, self.population, self.bins) == batch)
