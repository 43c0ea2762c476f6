"""Poisson sampling with a largest batch: of a draw that is larger, a uniformly random part is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dpfa_core.checks import integer
from dpfa_core.events import Event, Gaussian, TruncatedPoisson
from dpfa_core.spec import Relation
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.poisson import Poisson
from dpfa_training.sampling.secret_bits import Indices, uniform_subset

CUT = 1
"""First lane of the words that decide who is cut; lane 0 decides who is drawn."""


@dataclass(frozen=True)
class PoissonUpTo(Poisson):
    """A Poisson draw of at most `max_batch` units; here `population` is a public constant."""

    max_batch: int = 0
    relation: ClassVar[Relation] = "add_or_remove"

    def __post_init__(self) -> None:
        integer("max_batch", self.max_batch, least=1, remedy='sampling="truncated_poisson" needs a largest batch.')

    def event(self, release: Gaussian) -> Event:
        """``TruncatedPoisson``, whose price includes that a cut makes records depend on one another."""
        return TruncatedPoisson(self.sampling_probability, self.max_batch, self.population, release, self.relation)

    def units(self, keys: KeySource, draw: int) -> Indices:
        """The Poisson draw, cut."""
        drawn = super().units(keys, draw)
        if len(drawn) <= self.max_batch:
            return drawn
        return drawn[uniform_subset(keys, draw, len(drawn), self.max_batch, lane=CUT)]
