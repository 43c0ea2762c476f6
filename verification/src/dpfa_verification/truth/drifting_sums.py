"""Numbers whose float32 sum drifts: added one after the other, each addition is rounded the same way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TRIED = 2048
"""Numbers in [1, 2) that are looked at."""


def drifting(count: int, numbers: int) -> Tensor:
    """(numbers,) float32 in [1, 2) with the least accurate sums of `count` equal terms number / count.

    Args: `count`, a power of 2: the terms are exact.
    """
    tried = np.linspace(1.0, 2.0, TRIED, endpoint=False, dtype=np.float32)
    total = np.zeros_like(tried)
    for _ in range(count):
        total += tried / np.float32(count)
    worst = np.argsort(np.abs(total - tried))[-numbers:]
    return torch.from_numpy(tried[worst].copy())
