"""Sampling without replacement: every draw is a uniformly random subset of one public size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dpfa_core.events import Event, FixedSizeSampled, Gaussian
from dpfa_core.spec import Relation
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.sampler import PublicSizes
from dpfa_training.sampling.secret_bits import Indices, uniform_subset


@dataclass(frozen=True)
class FixedSize(PublicSizes):
    """Exactly `expected_batch_size` units in each draw, drawn afresh each time.

    The relation is "replace": with one unit fewer another one would take its place in the batch, so the sum
    moves by twice the clip norm.
    Source: Wang, Balle & Kasiviswanathan 2019.
    """

    relation: ClassVar[Relation] = "replace"

    def event(self, release: Gaussian) -> Event:
        """``FixedSizeSampled``; the noise of `release` is relative to the replace sensitivity."""
        return FixedSizeSampled(self.expected_batch_size, self.population, release, self.relation)

    def units(self, keys: KeySource, draw: int) -> Indices:
        """A uniform subset."""
        return uniform_subset(keys, draw, self.population, self.expected_batch_size)
