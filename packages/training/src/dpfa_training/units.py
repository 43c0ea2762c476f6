"""Rows that belong to one unit, such as a user's records, as one sample: their gradients add up before the clip."""

from __future__ import annotations

from typing import Any

import torch

from dpfa_training.tape import Note


def joined(note: Note, units: torch.Tensor) -> Note:
    """The note of units, for one of rows: what has positions puts a unit's rows one after the other.

    Args: units: (rows,) int64, the unit of each row; every number from 0 on occurs, and rows of a unit follow each
        other.
    """
    count = int(units[-1]) + 1
    if note.kind == "bare":
        (gradients,) = note.saved
        total = gradients.new_zeros(
            count, *gradients.shape[1:], dtype=torch.promote_types(gradients.dtype, torch.float32)
        )
        return Note("bare", (total.index_add_(0, units, gradients.to(total.dtype)),))
    sizes = torch.bincount(units, minlength=count)
    first = torch.cumsum(sizes, 0) - sizes
    place = torch.arange(len(units), device=units.device) - first[units]
    most = int(sizes.max())

    def spread(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        # positions of rows that a smaller unit does not have: token 0 with a gradient of zero
        wide = item.new_zeros(count, most, *item.shape[1:])
        wide[units, place] = item
        return wide.flatten(1, 2)

    return Note(note.kind, tuple(spread(item) for item in note.saved))
