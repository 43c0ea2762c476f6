"""ChaCha20's block function (RFC 8439, section 2.3), many counters at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_kernels_torch.noise.words32 import MASK, rotate_left

CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)


def chacha20(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Sixteen key-stream words for each setting of the state words 12 to 15.

    Guarantee: tested (RFC 8439's vectors; equal to OpenSSL's key stream).
    Args:
        key: int64 [8], 32-bit words.
        counter: state words 12, 13, 14, 15: int64 tensors of 32-bit words that broadcast to one shape.
    Returns: int64 [..., 16], 32-bit words.
    Source: RFC 8439, section 2.3.
    """
    last = torch.stack(torch.broadcast_tensors(*counter))
    shape = last.shape[1:]
    constants = torch.tensor(CONSTANTS, dtype=torch.int64, device=key.device)
    first = torch.cat([constants, key]).reshape(12, *[1] * len(shape)).expand(12, *shape)
    start = torch.cat([first, last]).reshape(4, 4, *shape)
    rows = tuple(start)
    for _ in range(10):
        rows = _quarter_rounds(*rows)
        rows = _shifted(rows, 1)
        rows = _quarter_rounds(*rows)
        rows = _shifted(rows, -1)
    return ((torch.stack(rows) + start) & MASK).flatten(0, 1).movedim(0, -1)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The four quarter rounds of a column round: each argument is one row of the 4x4 state."""
    a = (a + b) & MASK
    d = rotate_left(d ^ a, 16)
    c = (c + d) & MASK
    b = rotate_left(b ^ c, 12)
    a = (a + b) & MASK
    d = rotate_left(d ^ a, 8)
    c = (c + d) & MASK
    b = rotate_left(b ^ c, 7)
    return a, b, c, d


def _shifted(rows: tuple[Tensor, ...], direction: int) -> tuple[Tensor, ...]:
    """Row i rotated by i places: diagonals become columns, and back with ``direction=-1``."""
    return tuple(torch.roll(row, -direction * index, 0) for index, row in enumerate(rows))
