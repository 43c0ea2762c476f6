"""The noise of a release on the CPU: the fast twin of ``draw.pairs`` for ChaCha20, in pieces that fit the cache.

A stream (one head of one batch row) is one run of blocks, and a block's values lie at fixed rows and columns. So the
words of whole streams are made at once, transformed where they lie, and put into rows and columns last.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.contracts import NoiseKey
from dpfa_kernels_torch.noise.keystream import keystream_into
from dpfa_kernels_torch.noise.layout import RELEASE_FIELDS
from dpfa_kernels_torch.noise.training_run import workers

PIECE = 1 << 16
"""Values at a time, unless sixteen rows have more."""

ONE = torch.ones((), dtype=torch.float64)

_of_thread = threading.local()


def check_counters(x: Tensor, key: NoiseKey) -> int:
    """The release's number; raises PrivacyParameterError where it, or the size of `x` (B, S, H, columns), reaches the
    bound of its counter."""
    release = int(key.release.view(torch.int64))
    batch, rows, heads, columns = x.shape
    last = {"batch": batch - 1, "head": heads - 1, "row": rows - 1, "column": columns - 1, "release": release}
    for name, bound in RELEASE_FIELDS:
        value = last[name]
        require(value < bound, f"the noise counter's {name} must be in [0, {bound})", value, "Split the work.")
    return release


def add_release_run_(x: Tensor, scale: Tensor, key: NoiseKey, distribution: str, transform: str) -> None:
    """Add the noise of a whole release to `x` (B, S, H, columns) float32 or float64, in place.

    Guarantee: tested (equal to ``draw.pairs`` at the same coordinates).
    Args: scale: float64 (B, S, H), of any strides.
    """
    release = check_counters(x, key)
    B, S, H, D = x.shape
    if any(scale.stride()):
        scale = scale.transpose(1, 2).reshape(B * H, S)
    else:
        scale = scale[:1, :1, 0]
    noise = torch.empty(B * H, S, D, dtype=x.dtype)
    _run(noise, scale, key, release, distribution, transform)
    x += noise.view(B, H, S, D).transpose(1, 2)


def _run(out: Tensor, scale: Tensor, key: NoiseKey, release: int, distribution: str, transform: str) -> None:
    """Write the scaled noise of every value of a release into `out`.

    Args: `out`, float32 or float64 [batch * heads, rows, columns]; `scale`, float64 [batch * heads, rows] or [1, 1].
    """
    streams, rows, columns = out.shape
    secret = key.words.numpy().astype("<u4").tobytes()
    words = (release & 0xFFFFFFFF, release >> 32)
    # columns that one block spreads over, and the pairs of a row that lie in it
    span, pairs = (32, 4) if transform == "bm32" else (16, 2)
    across = -(-columns // span)
    groups = -(-rows // 16)
    of_group = 16 * across * span
    at_once = max(1, PIECE // of_group)
    many = max(1, at_once // groups)

    def piece(start: tuple[int, int]) -> None:
        stream, group = start
        some = range(stream, min(stream + many, streams))
        part = min(at_once, groups - group)
        workspace = getattr(_of_thread, "workspace", None)
        if workspace is None or workspace.size < len(some) * part * of_group:
            workspace = _of_thread.workspace = Workspace(max(PIECE, len(some) * part * of_group))
        blocks = 32 * across
        noise = workspace.standard(
            distribution, transform, len(some) * part * of_group, secret, some, group * blocks, part * blocks, words
        )
        first, stop = 16 * group, min(16 * (group + part), rows)
        where = slice(some[0], some[-1] + 1)
        shape = (len(some), part, 8, across, 4, pairs, 2)
        if scale.numel() == 1:
            noise.mul_(float(scale))
        else:
            # rows past the last one are cut off below
            each = torch.ones(len(some), 16 * part, dtype=torch.float64)
            each[:, : stop - first] = scale[where, first:stop]
            noise.view(*shape, 2).mul_(
                each.view(len(some), part, 2, 8).movedim(2, 3)[:, :, :, None, None, None, :, None]
            )
        narrow = workspace.narrow(noise, out.dtype)
        # a pair is moved as one number of twice the size
        whole = torch.int64 if out.dtype == torch.float32 else torch.complex128
        placed = narrow.view(whole).view(shape).permute(0, 1, 6, 2, 3, 5, 4)
        placed = placed.reshape(len(some), 16 * part, across * span // 2).view(out.dtype)
        out[where, first:stop] = placed[:, : stop - first, :columns]

    starts = [(s, g) for s in range(0, streams, many) for g in range(0, groups, at_once)]
    with torch.no_grad():
        if len(starts) == 1 or torch.get_num_threads() == 1:
            for start in starts:
                piece(start)
        else:
            for _ in workers(torch.get_num_threads()).map(piece, starts):
                pass


class Workspace:
    """Buffers of one thread: fresh ones would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._words = np.empty(2 * size, dtype="<i4")
        self._integers = torch.empty(size, dtype=torch.int64)
        self._noise = torch.empty(size, dtype=torch.float64)
        self._narrow = torch.empty(size, dtype=torch.float32)
        self._buffers = tuple(torch.empty(size, dtype=torch.float64) for _ in range(4))

    def standard(
        self,
        distribution: str,
        transform: str,
        values: int,
        secret: bytes,
        streams: range,
        first_block: int,
        blocks: int,
        release: tuple[int, int],
    ) -> Tensor:
        """Standard noise in the order of the words, float64 [values], valid until the next call."""
        size = 16 * blocks
        for place, stream in enumerate(streams):
            keystream_into(self._words[place * size : (place + 1) * size], secret, first_block, (stream, *release))
        words = torch.from_numpy(self._words[: size * len(streams)])
        noise = self._noise[:values]
        if distribution == "laplace":
            bits = words.view(torch.int64)
            magnitude = self._minus_log(torch.bitwise_right_shift(bits, 11, out=self._integers[:values]), 53)
            sign = noise.copy_(torch.bitwise_and(bits, 1, out=self._integers[:values])).mul_(-2.0).add_(1.0)
            return sign.mul_(magnitude)
        n = values // 2
        if transform == "bm32":
            radius = self._minus_log(words[0::2], 32)
            angle = self._buffers[3][:n].copy_(words[1::2])
        else:
            bits = words.view(torch.int64)[0::2]
            radius = self._minus_log(torch.bitwise_right_shift(bits, 11, out=self._integers[:n]), 53)
            angle = self._buffers[3][:n].copy_(words[2::4])
        radius.mul_(2.0).sqrt_()
        angle.mul_(2.0 * math.pi * 0.5**32)
        other = self._buffers[1][:n]
        pairs = noise.view(n, 2)
        torch.mul(torch.cos(angle, out=other), radius, out=pairs[:, 0])
        torch.mul(angle.sin_(), radius, out=pairs[:, 1])
        return noise

    def narrow(self, noise: Tensor, dtype: torch.dtype) -> Tensor:
        return noise if dtype == torch.float64 else self._narrow[: len(noise)].copy_(noise)

    def _minus_log(self, bits: Tensor, width: int) -> Tensor:
        """``normal.minus_log_uniform`` of words as signed numbers: the sign tells the nearer end of (0, 1)."""
        near, upper, lost = (buffer[: len(bits)] for buffer in self._buffers[:3])
        near.copy_(bits).add_(0.5)
        upper.copy_(near).lt_(0.0)
        tail = near.abs_().mul_(0.5**width)
        # u = 1 - tail in the upper half, rounded; what the rounding lost is added to the logarithm again
        rounded = torch.sub(ONE, tail, out=lost)
        uniform = torch.lerp(tail, rounded, upper, out=self._buffers[3][: len(bits)])
        lost = torch.sub(ONE, rounded, out=lost).sub_(tail).mul_(upper)
        return torch.add(uniform.log_(), lost, out=near).neg_()
