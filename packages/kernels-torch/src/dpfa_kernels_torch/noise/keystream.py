"""Runs of ChaCha20 blocks on the CPU, by the `cryptography` package: the fast twin of `chacha`."""

from __future__ import annotations

import struct

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

from dpfa_core.checks import require


def keystream(key: bytes, first_block: int, blocks: int, stream: tuple[int, int, int]) -> Tensor:
    """The words of `blocks` consecutive blocks that differ in state word 12 alone.

    Guarantee: tested (bit-equal to ``chacha.chacha20``).
    Args:
        key: 32 bytes.
        first_block: state word 12 of the first block.
        stream: state words 13, 14, 15.
    Returns: int32 [16 * blocks] on the CPU, each the bits of one 32-bit word.
    Raises: PrivacyParameterError where the 32-bit block number would wrap.
    """
    words = np.empty(16 * blocks, dtype="<i4")
    keystream_into(words, key, first_block, stream)
    return torch.from_numpy(words)


def keystream_into(words: NDArray[np.int32], key: bytes, first_block: int, stream: tuple[int, int, int]) -> None:
    """``keystream`` of ``len(words) / 16`` blocks, into memory that is there already."""
    last = first_block + len(words) // 16
    # Past 2**32 the cipher carries into word 13, which is another (batch, head) or parameter.
    require(first_block >= 0 and last <= 2**32, "a run of blocks must end at or before 2**32", last)
    words.fill(0)
    nonce = struct.pack("<4I", first_block, *stream)
    view = memoryview(words).cast("B")
    Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update_into(view, view)
