"""Poisson batches: each record takes part in each draw independently, decided by secret bits.

One draw may be served in several physical batches; each carries its own padding weights and whether it
is the last of its draw, so leaving a loop early or a small memory cannot join two draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dpfa_core.checks import integer, require
from dpfa_core.errors import NotPrivateError
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_kernels_torch.noise.keystream import keystream
from dpfa_training.plan import TrainingPlan

SMALLEST_PHYSICAL_BATCH = 2
"""Smaller draws, the empty one too, are padded with rows of weight 0."""


@dataclass(frozen=True)
class PhysicalBatch:
    """What the engine must know of the rows that the user's loop is about to see."""

    draw: int
    """Number of the Poisson draw; never used twice."""
    indices: tuple[int, ...]
    weights: torch.Tensor
    """(rows,) float32: 1 for a drawn record, 0 for padding."""
    last: bool
    """Whether the draw is complete with this batch."""


class PoissonSampler:
    """Yields the index lists of physical batches; ``position`` is the next draw."""

    def __init__(self, plan: TrainingPlan, keys: KeySource, max_physical_batch_size: int | None) -> None:
        if max_physical_batch_size is not None:
            integer("max_physical_batch_size", max_physical_batch_size, least=SMALLEST_PHYSICAL_BATCH)
        self.plan, self.keys = plan, keys
        self.max_physical_batch_size = max_physical_batch_size
        self.position = 0

    def draw(self) -> list[PhysicalBatch]:
        """One Poisson draw, cut into physical batches."""
        number, self.position = self.position, self.position + 1
        words = uniform_words(self.keys, number, self.plan.population)
        # Rounded down: no record takes part with more than the accounted probability.
        threshold = (self.plan.expected_batch_size << 64) // self.plan.population
        if threshold == 1 << 64:
            drawn = np.arange(self.plan.population)
        else:
            drawn = np.flatnonzero(words < np.uint64(threshold))
        size = self.max_physical_batch_size or max(len(drawn), 1)
        chunks = [drawn[start : start + size] for start in range(0, max(len(drawn), 1), size)]
        return [_padded(number, chunk.tolist(), last=index == len(chunks) - 1) for index, chunk in enumerate(chunks)]


def uniform_words(keys: KeySource, draw: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """`count` uniform 64-bit words that no other draw shares: ChaCha20 blocks under the sampling key."""
    key = keys.key("sampling")
    secret = np.asarray(key.words).astype("<u4").tobytes()
    blocks = -(-count // 8)
    words = keystream(secret, 0, blocks, (draw & 0xFFFFFFFF, draw >> 32, 0))
    return np.asarray(words).view(np.uint64)[:count]


def _padded(draw: int, indices: list[int], *, last: bool) -> PhysicalBatch:
    missing = max(0, SMALLEST_PHYSICAL_BATCH - len(indices))
    weights = torch.tensor([1.0] * len(indices) + [0.0] * missing)
    return PhysicalBatch(draw, tuple(indices + [0] * missing), weights, last)


class PoissonLoader:
    """Replaces the user's ``DataLoader``: same data and collation, Poisson batches.

    Iterating gives one epoch of ``plan.steps_per_epoch`` draws; ``announce`` is called with each physical
    batch right before the loop sees its rows.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: PoissonSampler,
        announce: Callable[[PhysicalBatch], None],
    ) -> None:
        self.dataset, self.sampler = loader.dataset, sampler
        self._source, self._announce = loader, announce

    def __len__(self) -> int:
        """Draws in one epoch."""
        return self.sampler.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        return self.draws(len(self))

    def draws(self, count: int) -> Iterator[Any]:
        """The rows of the next `count` draws, as the user's collation gives them."""
        pending: list[PhysicalBatch] = []
        rows = DataLoader(
            self.dataset,
            batch_sampler=_Indices(self.sampler, count, pending),
            collate_fn=self._source.collate_fn,
            num_workers=self._source.num_workers,
            pin_memory=self._source.pin_memory,
            worker_init_fn=self._source.worker_init_fn,
        )
        for batch in rows:
            self._announce(pending.pop(0))
            yield batch


class _Indices:
    """The batch sampler inside; remembers in order what it has handed to the (prefetching) loader."""

    def __init__(self, sampler: PoissonSampler, draws: int, pending: list[PhysicalBatch]) -> None:
        self.sampler, self.draws, self.pending = sampler, draws, pending

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.draws):
            for batch in self.sampler.draw():
                self.pending.append(batch)
                yield list(batch.indices)


def check_loader(loader: DataLoader[Any]) -> tuple[int, int]:
    """(records, batch size) of a loader whose sampling may be replaced by Poisson sampling.

    Raises: NotPrivateError for a sampler of the user's own, which is not silently replaced.
    """
    dataset = loader.dataset
    if not isinstance(dataset, Sized) or isinstance(dataset, torch.utils.data.IterableDataset):
        raise NotPrivateError(
            f"Poisson sampling needs a dataset with a length and an index, got {type(dataset).__name__}; "
            "use a map-style dataset."
        )
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler) and (type(loader.batch_sampler) is BatchSampler)
    replacement = getattr(loader.sampler, "replacement", False)
    subset = getattr(loader.sampler, "_num_samples", None) is not None
    if not plain or replacement or subset:
        raise NotPrivateError(
            f"the loader must use torch's own sequential or shuffled sampling of the whole dataset, got "
            f"{type(loader.batch_sampler or loader.sampler).__name__} over {type(loader.sampler).__name__}; "
            "it would be replaced by Poisson sampling, so build the DataLoader with batch_size=... only."
        )
    size = loader.batch_size or 0
    require(
        1 <= size <= len(dataset),
        f"batch_size must be between 1 and the {len(dataset)} training records",
        size,
        "Choose a smaller batch size.",
    )
    return len(dataset), size
