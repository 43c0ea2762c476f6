"""Philox4x32-10 (Salmon et al. 2011, Random123): fast, reproducible, not cryptographic."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_kernels_torch.noise.words32 import MASK

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> Tensor:
    """Four words for each counter.

    Guarantee: tested (Random123's known answers).
    Args:
        counter: four int64 tensors of 32-bit words that broadcast to one shape.
        key: int64 [2], 32-bit words.
    Returns: int64 [..., 4], 32-bit words.
    Source: Salmon, Moraes, Dror & Shaw 2011, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[0], key[1]
    for _ in range(10):
        # The 64-bit product wraps into the sign bit; the masks below read the right bits all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
