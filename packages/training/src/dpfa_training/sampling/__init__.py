"""Sampling: who takes part in a step is decided by secret bits, and charged as it was decided."""

from __future__ import annotations

from dpfa_training.sampling.balls_in_bins import BallsInBins
from dpfa_training.sampling.draws import SMALLEST_PHYSICAL_BATCH, Draws
from dpfa_training.sampling.fixed_size import FixedSize
from dpfa_training.sampling.loader import Listener, PrivateLoader
from dpfa_training.sampling.loader_check import check_loader
from dpfa_training.sampling.memory import MemoryProbe
from dpfa_training.sampling.physical_batch import PhysicalBatch
from dpfa_training.sampling.poisson import Poisson
from dpfa_training.sampling.sampler import Sampler
from dpfa_training.sampling.truncated_poisson import PoissonUpTo
from dpfa_training.sampling.users import Users

__all__ = [
    "SMALLEST_PHYSICAL_BATCH",
    "BallsInBins",
    "Draws",
    "FixedSize",
    "Listener",
    "MemoryProbe",
    "PhysicalBatch",
    "Poisson",
    "PoissonUpTo",
    "PrivateLoader",
    "Sampler",
    "Users",
    "check_loader",
]
