"""Philox4x32-10 and ChaCha20 in numpy, written from their specifications."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

ROUND_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
SIGMA = np.frombuffer(b"expand 32-byte k", dtype="<u4")


def philox(key: Words, counters: Words) -> Words:
    """Salmon et al. 2011, section 3.3: counters [n, 4], key [2] to words [n, 4]."""
    x = counters.astype(np.uint64)
    k = [int(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        first, second = ROUND_MULTIPLIERS[0] * x[:, 0], ROUND_MULTIPLIERS[1] * x[:, 2]
        x = np.stack(
            [
                (second >> np.uint64(32)) ^ x[:, 1] ^ np.uint64(k[0]),
                second & low,
                (first >> np.uint64(32)) ^ x[:, 3] ^ np.uint64(k[1]),
                first & low,
            ],
            axis=1,
        )
        k = [(word + step) & 0xFFFFFFFF for word, step in zip(k, KEY_INCREMENTS, strict=True)]
    return x.astype(np.uint32)


def chacha20(key: Words, counters: Words) -> Words:
    """RFC 8439, section 2.3: state words 12 to 15 [n, 4], key [8] to key-stream words [n, 16]."""
    start = np.empty((len(counters), 16), dtype=np.uint32)
    start[:, :4], start[:, 4:12], start[:, 12:] = SIGMA, key, counters
    x = start.copy()
    for _ in range(10):
        for column in range(4):
            _quarter(x, column, column + 4, column + 8, column + 12)
        for column in range(4):
            _quarter(x, column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return x + start


def _quarter(x: Words, a: int, b: int, c: int, d: int) -> None:
    for into, add, turn, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[:, into] += x[:, add]
        mixed = x[:, turn] ^ x[:, into]
        x[:, turn] = (mixed << np.uint32(bits)) | (mixed >> np.uint32(32 - bits))


GENERATORS = {"philox4x32-10": philox, "chacha20": chacha20}
