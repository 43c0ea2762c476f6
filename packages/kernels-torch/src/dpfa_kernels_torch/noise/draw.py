"""Noise values at coordinates: layout, generator and transform put together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.keystream import keystream
from dpfa_kernels_torch.noise.laplace import laplace53
from dpfa_kernels_torch.noise.layout import LAYOUTS, evaluate
from dpfa_kernels_torch.noise.normal import bm32, bm64
from dpfa_kernels_torch.noise.philox import philox4x32
from dpfa_kernels_torch.noise.words32 import from_uint32

TRANSFORMS = {
    ("gaussian", "bm32"): (2, bm32),
    ("gaussian", "bm64"): (4, bm64),
    ("laplace", "bm64"): (4, laplace53),
}
"""(distribution, transform) to (words of one pair of values, function)."""


def pairs(
    key: NoiseKey,
    distribution: str,
    transform: str,
    coordinates: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> Tensor:
    """Standard noise of the pairs of values whose first members have the given (even) coordinates.

    Guarantee: tested (fast path equal to the truth; chi-square, KS, independence at fixed seeds).
    Args:
        coordinates: one int64 tensor for each field. The fields of the stream (batch, head; parameter,
            step) vary along leading dimensions, those within it along the others.
        counts: see ``layout.evaluate``.
    Returns: float64 [..., 2].
    """
    width, function = TRANSFORMS[distribution, transform]
    counter, lane = evaluate(LAYOUTS[key.purpose, key.generator, transform], coordinates, counts)
    group = lane >> (width.bit_length() - 1)
    return function(words_at(key, counter, group, width))


def words_at(key: NoiseKey, counter: tuple[Tensor, ...], group: Tensor, width: int) -> Tensor:
    """The `group`-th `width` words of the block at each counter: int64 [..., width]."""
    if key.generator == "philox4x32-10":
        blocks = philox4x32(counter, from_uint32(key.words)).unflatten(-1, (-1, width))
        chosen = group.expand(blocks.shape[:-2])[..., None, None].expand(*blocks.shape[:-2], 1, width)
        return blocks.gather(-2, chosen).squeeze(-2)

    # Neighbours share ChaCha blocks, so each stream (words 13 to 15) is computed as one run and gathered.
    block, stream = counter[0], torch.stack(torch.broadcast_tensors(*counter[1:]), dim=-1)
    shape = torch.broadcast_shapes(block.shape, stream.shape[:-1])
    stream = stream.reshape(-1, 3)
    if len(stream) * block.numel() != shape.numel():
        raise AssertionError("streams vary along leading dimensions, blocks along the others")
    first_block = int(block.min())
    run_of = fast_chacha_run if stream.device.type == "cpu" else chacha_run
    run = run_of(key, first_block, int(block.max()) + 1 - first_block, stream)
    index = (block - first_block) * (16 // width) + group
    return from_uint32(run.unflatten(1, (-1, width)).index_select(1, index.flatten())).reshape(*shape, width)


def chacha_run(key: NoiseKey, first_block: int, blocks: int, streams: Tensor) -> Tensor:
    """Words of consecutive blocks of each stream (n, 3): int32 bits [n, 16 * blocks], on any device."""
    numbers = first_block + torch.arange(blocks, device=streams.device)
    words = chacha20(from_uint32(key.words), (numbers, *streams.T.unsqueeze(-1)))
    return words.to(torch.int32).flatten(1)


def fast_chacha_run(key: NoiseKey, first_block: int, blocks: int, streams: Tensor) -> Tensor:
    """The same words, for CPU tensors."""
    secret = key.words.numpy().astype("<u4").tobytes()
    return torch.stack([keystream(secret, first_block, blocks, tuple(stream)) for stream in streams.tolist()])
