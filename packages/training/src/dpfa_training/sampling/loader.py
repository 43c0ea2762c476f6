"""The user's loader with private draws in it: same data, workers and collation, another sampler."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dpfa_core.errors import NotPrivateError
from dpfa_training.sampling.draws import Draws
from dpfa_training.sampling.physical_batch import PhysicalBatch

Request = tuple[int, list[int]]
"""What a worker is asked for: (seed of its random augmentation, records)."""


class Listener(Protocol):
    """Who is told what the loop sees: the engine."""

    def announce(self, batch: PhysicalBatch) -> None:
        """The loop is about to see the rows of `batch`."""
        ...

    def abandon(self) -> None:
        """The loop was left and begins anew; what it had not finished will not be."""
        ...


class PrivateLoader:
    """Replaces the user's ``DataLoader``; iterating gives one epoch of draws.

    The listener hears of each physical batch right before the loop sees its rows, however far workers are
    ahead. Leaving the loop gives up the draw it was in, and rows that workers had fetched are thrown away.
    Random augmentation in workers is seeded for each physical batch, so that it does not depend on which
    worker did what before.
    """

    def __init__(self, loader: DataLoader[Any], draws: Draws, listener: Listener) -> None:
        self.dataset, self.sampler = loader.dataset, draws
        self.num_workers = loader.num_workers
        draws.workers, draws.data = loader.num_workers > 0, data_digest(loader.dataset)
        draws.augmentation_seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator))
        self._listener = listener
        # its own: beginning an epoch must not move the generator that dropout uses
        self._generator = torch.Generator()
        self._requests = _Requests()
        workers: dict[str, Any] = {}
        if loader.num_workers:
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
                "multiprocessing_context": loader.multiprocessing_context,
            }
        self._rows: DataLoader[Any] = DataLoader(
            _Rows(loader.dataset),
            batch_sampler=self._requests,  # type: ignore[arg-type]
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=self._generator,
            **workers,
        )
        self._turn = 0
        self._inside = False

    def __len__(self) -> int:
        """Draws in one epoch."""
        return self.sampler.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        return self._serve(None)

    def draws(self, count: int) -> Iterator[Any]:
        """The rows of the next `count` draws, as the user's collation gives them."""
        return self._serve(count)

    def _serve(self, count: int | None) -> Iterator[Any]:
        self._turn += 1
        turn, draws = self._turn, self.sampler
        resumed = draws.enter()
        if self._inside and not resumed:
            self._listener.abandon()
        self._inside = True
        left = draws.rest_of_epoch(resumed=resumed) if count is None else count
        while left > 0:
            keys, pending = draws.keys, deque[PhysicalBatch]()
            self._requests.source = self._asking(left, pending)
            self._generator.manual_seed(self._seed_of(draws.position, draws.start))
            for rows in self._rows:
                batch = pending.popleft()
                draws.reached(batch)
                self._listener.announce(batch)
                try:
                    yield rows
                except GeneratorExit:
                    if self._turn == turn:
                        draws.leave()
                    raise
                if self._turn != turn:
                    raise NotPrivateError(
                        "a private loader serves one loop at a time, got a second one inside the first, which "
                        "would see the same draws; finish or leave a loop before the next one."
                    )
                if draws.keys is not keys:  # what was fetched ahead was drawn by keys that are no longer used
                    break
                left -= batch.last
        self._inside = False

    def _asking(self, count: int, pending: deque[PhysicalBatch]) -> Iterator[Request]:
        for batch in self.sampler.batches(count):
            pending.append(batch)
            yield self._seed_of(batch.draw, batch.start), list(batch.indices)

    def _seed_of(self, draw: int, start: int) -> int:
        text = f"{self.sampler.augmentation_seed}/{draw}/{start}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def data_digest(dataset: Any) -> str:
    """What can be told of a dataset without reading it: its kind and length."""
    return f"{type(dataset).__module__}.{type(dataset).__qualname__}/{len(dataset)}"


class _Requests:
    """The batch sampler inside; the next loop takes its requests from ``source``."""

    source: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.source


class _Rows(Dataset[Any]):
    """The user's dataset, asked for a whole physical batch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, request: Request) -> list[Any]:
        seed, indices = request
        if get_worker_info() is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)
        if getattr(self.dataset, "__getitems__", None):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]
