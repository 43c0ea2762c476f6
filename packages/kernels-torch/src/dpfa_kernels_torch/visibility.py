"""The visible keys of every query row, as tensors."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dpfa_core.spec import AttentionProblem
from dpfa_core.visibility import lengths, visible_range

ROWS_AT_ONCE = 256
"""Rows of a packed mask that are bits at a time."""


@lru_cache(maxsize=32)
def key_ranges(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """(start, stop) of the keys that each row sees: int64 [B, S] on the CPU, [1, S] without `lengths`.

    A row past its batch row's query length is padding and sees nothing. Of the keys in its range a row sees
    those that a packed mask shows, see ``shown``.
    """
    unmasked = dataclasses.replace(problem, mask=None)
    batches = range(problem.batch if problem.lengths else 1)
    ranges = [
        [
            visible_range(unmasked, row, batch) if row < lengths(problem, batch)[0] else (0, 0)
            for row in range(problem.q_len)
        ]
        for batch in batches
    ]
    start, stop = torch.tensor(ranges, dtype=torch.int64).unbind(-1)
    return start, stop


def visible_keys(problem: AttentionProblem, batches: slice, rows: slice, low: int, high: int) -> Tensor:
    """Which of the keys from `low` to `high` each row sees: bool [B or 1, rows, high - low] on the CPU."""
    some = batches if problem.lengths else slice(None)
    start, stop = (x[some, rows, None] for x in key_ranges(problem))
    key = torch.arange(low, high)
    seen = (start <= key) & (key < stop)
    return seen if problem.mask is None else seen & shown(problem, rows)[:, low:high]


def shown(problem: AttentionProblem, rows: slice) -> Tensor:
    """The packed mask of some rows, the same for every batch row: bool [rows, kv_len] on the CPU."""
    first, last, _ = rows.indices(problem.q_len)
    start, stop = first * problem.kv_len, last * problem.kv_len
    # rows need not begin where bytes do
    packed = np.frombuffer(problem.mask or b"", dtype=np.uint8)[start // 8 : -(-stop // 8)]
    bits = np.unpackbits(packed)[start % 8 :][: stop - start]
    return torch.from_numpy(bits.astype(bool)).reshape(last - first, problem.kv_len)


@lru_cache(maxsize=32)
def visible_counts(problem: AttentionProblem) -> Tensor:
    """How many keys each row sees: int64 [B, S] on the CPU, [1, S] without `lengths`."""
    start, stop = key_ranges(problem)
    if problem.mask is None:
        return stop - start
    parts = [
        visible_keys(problem, slice(None), slice(first, first + ROWS_AT_ONCE), 0, problem.kv_len).sum(-1)
        for first in range(0, problem.q_len, ROWS_AT_ONCE)
    ]
    return torch.cat(parts, dim=1)
