"""The visible keys of every query row, as tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dpfa_core.spec import AttentionProblem
from dpfa_core.visibility import lengths, visible_range


@lru_cache(maxsize=32)
def key_ranges(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """(start, stop) of the keys that each row sees: int64 [B, S] on the CPU, [1, S] without `lengths`.

    A row past its batch row's query length is padding and sees nothing.
    """
    batches = range(problem.batch if problem.lengths else 1)
    ranges = [
        [
            visible_range(problem, row, batch) if row < lengths(problem, batch)[0] else (0, 0)
            for row in range(problem.q_len)
        ]
        for batch in batches
    ]
    start, stop = torch.tensor(ranges, dtype=torch.int64).unbind(-1)
    return start, stop
