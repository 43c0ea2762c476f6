"""Unsigned 32-bit words held in int64 tensors, which torch can compute with on every device."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def from_uint32(words: Tensor) -> Tensor:
    """The values of a uint32 (or reinterpreted int32) tensor as int64 in [0, 2**32)."""
    return words.view(torch.uint32).to(torch.int64)


def rotate_left(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & MASK
