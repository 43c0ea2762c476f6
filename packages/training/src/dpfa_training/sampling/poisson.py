"""Poisson sampling: each unit takes part in each draw independently of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dpfa_core.events import Event, Gaussian, PoissonSampled
from dpfa_core.spec import Relation
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.sampler import PublicSizes
from dpfa_training.sampling.secret_bits import Indices, uniform_words


@dataclass(frozen=True)
class Poisson(PublicSizes):
    """Probability `expected_batch_size` / `population`; a draw may be empty.

    Source: Abadi et al. 2016.
    """

    relation: ClassVar[Relation] = "add_or_remove"

    def event(self, release: Gaussian) -> Event:
        """``PoissonSampled`` at the probability rounded up."""
        return PoissonSampled(self.sampling_probability, release, self.relation)

    def units(self, keys: KeySource, draw: int) -> Indices:
        """Those whose word lies below the threshold."""
        # Rounded down: no unit takes part with more than the accounted probability.
        threshold = (self.expected_batch_size << 64) // self.population
        if threshold == 1 << 64:
            return np.arange(self.population)
        return np.flatnonzero(uniform_words(keys, draw, self.population) < np.uint64(threshold))
