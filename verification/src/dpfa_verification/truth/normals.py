"""Standard normals from counters: the published transforms in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpfa_verification.truth.counters import Counters
from dpfa_verification.truth.generators import GENERATORS, Words

WORDS_OF_A_PAIR = {"bm32": 2, "bm64": 4}


def normals(key: Words, generator: str, transform: str, counters: Counters) -> NDArray[np.float64]:
    """The value at each counter and lane.

    An even lane takes the cosine, the odd one after it the sine, of the pair that starts at the lane rounded
    down to the number of words that a pair takes.
    """
    words, lane = counters
    broadcast = np.stack(np.broadcast_arrays(*words, lane), axis=-1)
    shape, flat = broadcast.shape[:-1], broadcast.reshape(-1, 5)
    # Neighbours share a block: each is computed once.
    blocks, index = np.unique(flat[:, :4], axis=0, return_inverse=True)
    stream = GENERATORS[generator](key, blocks.astype(np.uint32))[index.reshape(-1)].astype(np.uint64)
    width = WORDS_OF_A_PAIR[transform]
    first = flat[:, 4] & -width
    taken = np.take_along_axis(stream, first[:, None] + np.arange(width), axis=1)
    if transform == "bm32":
        radius, angle = minus_log(taken[:, 0], 32), taken[:, 1]
    else:
        radius, angle = minus_log(((taken[:, 1] << np.uint64(32)) + taken[:, 0]) >> np.uint64(11), 53), taken[:, 2]
    turn = 2 * np.pi * angle.astype(np.float64) * 2.0**-32
    value = np.sqrt(2 * radius) * np.where(flat[:, 4] & 1, np.sin(turn), np.cos(turn))
    return value.reshape(shape)


def minus_log(x: NDArray[np.uint64], bits: int) -> NDArray[np.float64]:
    """-ln((x + 1/2) / 2**bits), by log1p of the complement where the argument is near 1."""
    near_one = x >= np.uint64(1) << np.uint64(bits - 1)
    complement = (np.uint64(2**bits - 1) - x).astype(np.float64) + 0.5
    direct = np.where(near_one, 1.0, (x.astype(np.float64) + 0.5) * 2.0**-bits)
    return np.where(near_one, -np.log1p(-np.where(near_one, complement, 0.0) * 2.0**-bits), -np.log(direct))
