"""What the engine must know of the rows that the user's loop is about to see."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PhysicalBatch:
    """Rows of one draw that are in memory together."""

    draw: int
    """Number of the draw; never used twice."""
    indices: tuple[int, ...]
    """Records, one for each row; padding repeats one."""
    weights: torch.Tensor
    """(rows,) float32: 1 for a drawn record, 0 for padding."""
    last: bool
    """Whether the draw is complete with this batch."""
    start: int = 0
    """Units of the draw that earlier batches held."""
    count: int = 0
    """Units of the draw in this batch; none is divided between batches."""
    round: int = 0
    """Draws of one round are paid for together."""
    units: torch.Tensor | None = None
    """(rows,) int64: the unit that each row belongs to, 0 <= unit < count, its rows one after the other; padding
    rows have the unit `count` and weight 0. None where every row is a unit of its own."""
