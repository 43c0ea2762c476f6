"""Arithmetic that the caller's global settings cannot weaken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradient tape, and no autocast: it would turn float32 products into bfloat16 ones."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply in: float32, or float64 where float32 products are not what they say.

    With TF32 (or bfloat16 on the CPU) allowed for float32 matrices, a product keeps 11 (8) bits; the bounds
    on clipped norms assume 24.
    """
    backend = torch.backends.cuda if x.device.type == "cuda" else torch.backends.mkldnn
    if x.dtype == torch.float64 or backend.matmul.fp32_precision in ("tf32", "bf16"):
        return torch.float64
    return torch.float32
