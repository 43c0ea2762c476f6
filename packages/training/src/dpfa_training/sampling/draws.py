"""Draws cut into physical batches, and how far the loop has come in them.

One draw may be served in several physical batches; each carries its own padding weights and whether it is
the last of its draw, so leaving a loop early or a small memory cannot join two draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dpfa_core.checks import integer, require
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.sampling.memory import MemoryProbe
from dpfa_training.sampling.physical_batch import PhysicalBatch
from dpfa_training.sampling.sampler import Sampler
from dpfa_training.sampling.secret_bits import Indices
from dpfa_training.sampling.users import Users

SMALLEST_PHYSICAL_BATCH = 2
"""Smaller draws, the empty one too, are padded with rows of weight 0, unless one row at a time was asked for."""


class Draws:
    """Yields the physical batches of one draw after the other; what was seen is never served again.

    Args:
        sampler: who takes part in which draw.
        keys: whose sampling key decides it.
        max_rows: largest physical batch, None for the whole draw, or what chooses it while the first draw runs.
        users: where a unit is a user; its records are never divided between physical batches.
    """

    def __init__(
        self,
        sampler: Sampler,
        keys: KeySource,
        max_rows: int | MemoryProbe | None = None,
        users: Users | None = None,
    ) -> None:
        if isinstance(max_rows, int):
            integer("max_physical_batch_size", max_rows, least=1)
            require(
                users is None or users.largest <= max_rows,
                f"max_physical_batch_size must hold all records of a user ({users.largest if users else 0} at most)",
                max_rows,
                "Raise it, or leave out some records of the largest users.",
            )
        self.sampler, self.keys, self.max_rows, self.users = sampler, keys, max_rows, users
        self.position = 0
        """Number of the draw that comes next, or of the one that the loop is in."""
        self.start = 0
        """Units of draw ``position`` that the loop has seen; 0 between draws."""
        self.epoch_end = 0
        """Draw at which the epoch ends that the loop is in."""
        self.augmentation_seed = 0
        """Public: of what workers do at random with the rows that they fetch."""
        self.workers, self.data = False, ""
        """Whether workers fetch the rows, and of what: a resumed run must have the same."""
        self._resumed = self._left = False

    # ---- serving

    def batches(self, count: int) -> Iterator[PhysicalBatch]:
        """The physical batches of the next `count` draws, the rest of a begun one included; moves nothing."""
        first, start = self.position, self.start
        for draw in range(first, first + count):
            yield from self._cut(draw, start if draw == first else 0)

    def draw(self) -> list[PhysicalBatch]:
        """The physical batches of the next whole draw, for who fetches the rows by himself; moves on."""
        self._give_up()
        parts = list(self.batches(1))
        for part in parts:
            self.reached(part)
        return parts

    def reached(self, batch: PhysicalBatch) -> None:
        """The loop is about to see `batch`."""
        if isinstance(self.max_rows, MemoryProbe):
            self.max_rows.expect(len(batch.weights))
        self.position, self.start = (batch.draw + 1, 0) if batch.last else (batch.draw, batch.start + batch.count)

    def clipped(self, rows: int, seconds: float) -> None:
        """The engine needed `seconds` for a physical batch of `rows` rows."""
        if isinstance(self.max_rows, MemoryProbe):
            self.max_rows.clipped(rows, seconds)

    def enter(self) -> bool:
        """A loop begins; returns whether it goes on inside the draw that a checkpoint was taken in.

        Otherwise a draw that was left unfinished is given up: it was drawn once and is not drawn again.
        """
        resumed, self._resumed, self._left = self._resumed, False, False
        if not resumed:
            self._give_up()
        return resumed

    def leave(self) -> None:
        """The loop was left; what it had not finished is given up when the next one begins."""
        self._left = True

    def rest_of_epoch(self, *, resumed: bool) -> int:
        """How many draws the epoch that begins, or goes on, still has."""
        if not resumed or self.position >= self.epoch_end:
            self._to_next_round()
            self.epoch_end = self.position + self.sampler.steps_per_epoch
        return self.epoch_end - self.position

    def renew(self, keys: KeySource) -> None:
        """Draw by other keys from here on; a begun draw or round is given up."""
        self.keys = keys
        self._give_up()
        self._to_next_round()

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """Where the loop is, as numbers."""
        rows = self.max_rows.chosen if isinstance(self.max_rows, MemoryProbe) else self.max_rows
        given_up = self._left and self.start > 0
        return {
            "position": self.position + given_up,
            "start": 0 if given_up else self.start,
            "epoch_end": 0 if self._left else self.epoch_end,
            "max_rows": rows,
            "augmentation_seed": self.augmentation_seed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the size of physical batches that was found then is kept."""
        self.position, self.start, self.epoch_end = state["position"], state["start"], state["epoch_end"]
        self.augmentation_seed = state["augmentation_seed"]
        if isinstance(self.max_rows, MemoryProbe) and state["max_rows"] is not None:
            self.max_rows = state["max_rows"]
        self._resumed = True

    # ---- cutting

    def _give_up(self) -> None:
        if self.start:
            self.position, self.start = self.position + 1, 0

    def _to_next_round(self) -> None:
        length = self.sampler.steps_per_round
        self.position = -(-self.position // length) * length

    def _cut(self, draw: int, start: int) -> Iterator[PhysicalBatch]:
        drawn = self.sampler.units(self.keys, draw)
        while True:
            count = self._fitting(drawn, start)
            yield self._batch(draw, drawn[start : start + count].tolist(), start, last=start + count >= len(drawn))
            start += count
            if start >= len(drawn):
                return

    def _fitting(self, drawn: Indices, start: int) -> int:
        """How many units go into the physical batch that begins at `start`."""
        limit = self.max_rows.rows() if isinstance(self.max_rows, MemoryProbe) else self.max_rows
        left = len(drawn) - start
        if limit is None:
            return left
        if self.users is None:
            return min(left, limit)
        rows = 0
        for count, user in enumerate(drawn[start:].tolist()):
            rows += len(self.users.records[user])
            if rows > limit:
                return max(1, count)
        return left

    def _batch(self, draw: int, chosen: list[int], start: int, *, last: bool) -> PhysicalBatch:
        rows = chosen if self.users is None else [row for user in chosen for row in self.users.records[user]]
        least = 1 if self.max_rows == 1 else SMALLEST_PHYSICAL_BATCH
        missing = max(0, least - len(rows))
        units = None
        if self.users is not None:
            lengths = torch.tensor([*(len(self.users.records[user]) for user in chosen), missing])
            units = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return PhysicalBatch(
            draw=draw,
            indices=tuple(rows + [0] * missing),
            weights=torch.tensor([1.0] * len(rows) + [0.0] * missing),
            last=last,
            start=start,
            count=len(chosen),
            round=draw // self.sampler.steps_per_round,
            units=units,
        )
