"""Random decisions of the samplers: words of the secret sampling key, and exact choices made from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_kernels_torch.noise.keystream import keystream

Words = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def uniform_words(keys: KeySource, draw: int, count: int, lane: int = 0) -> Words:
    """`count` uniform 64-bit words that no other (draw, lane) shares: ChaCha20 blocks under the sampling key."""
    key = keys.key("sampling")
    secret = np.asarray(key.words).astype("<u4").tobytes()
    blocks = -(-count // 8)
    words = keystream(secret, 0, blocks, (draw & 0xFFFFFFFF, draw >> 32, lane))
    return np.asarray(words).view(np.uint64)[:count]


def uniform_subset(keys: KeySource, draw: int, count: int, size: int, lane: int = 0) -> Indices:
    """A uniformly random subset of exactly `size` of the numbers below `count`, in ascending order.

    Guarantee: proved. The numbers with the least words form it; exchanging two numbers exchanges their words,
    so all subsets are equally likely, also after the draws in which a tie leaves the choice open are thrown away.
    """
    if size >= count:
        return np.arange(count)
    while True:
        words = uniform_words(keys, draw, count, lane)
        order = np.argpartition(words, (size - 1, size))
        if words[order[size - 1]] != words[order[size]]:
            return np.sort(order[:size])
        lane += 1


def uniform_below(keys: KeySource, draw: int, count: int, bound: int) -> Indices:
    """`count` independent uniform numbers below `bound`; words past the last multiple of it are drawn again."""
    whole = (1 << 64) - (1 << 64) % bound
    found = np.zeros(count, dtype=np.int64)
    missing, lane = np.arange(count), 0
    while len(missing):
        words = uniform_words(keys, draw, len(missing), lane)
        good = words <= np.uint64(whole - 1)
        found[missing[good]] = (words[good] % np.uint64(bound)).astype(np.int64)
        missing, lane = missing[~good], lane + 1
    return found
