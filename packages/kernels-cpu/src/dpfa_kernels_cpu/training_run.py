"""The training noise of consecutive elements, key stream to sum in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpfa_kernels_cpu.library import best_level, function
from dpfa_kernels_torch.noise.training_run import workers

SMALL = 1 << 17
"""Elements that one thread adds about as quickly as two that have to be woken (two AMD EPYC cores, November 2026)."""

OF_BLOCK = 8
"""Elements whose noise one block of the key stream makes."""


def add_run_(
    flat: Tensor,
    std: float,
    secret: bytes,
    *,
    parameter: int,
    step: int,
    first_element: int,
    level: int | None = None,
) -> None:
    """Add N(0, std**2) to `flat` (n,) float32 or float64, contiguous, in place.

    Guarantee: tested (float32 equal to torch's noise, float64 to rounding; every instruction set the same).
    Args: level: the instruction set, a number into ``LEVELS``; the processor's best by default.
    """
    level = best_level() if level is None else level
    add = function("dpfa_add_noise_f32" if flat.dtype == torch.float32 else "dpfa_add_noise_f64")
    stream = (ctypes.c_uint32 * 3)(parameter, step & 0xFFFFFFFF, step >> 32)
    size, address, width = flat.numel(), flat.data_ptr(), flat.element_size()

    def part(bounds: tuple[int, int]) -> None:
        start, stop = bounds
        block, skip = divmod(first_element + start, OF_BLOCK)
        failed = add(level, address + start * width, skip, stop - start, std, secret, block, stream)
        assert not failed, level  # noqa: S101  (a level that `best_level` gave was built)

    threads = torch.get_num_threads()
    if size <= SMALL or threads == 1:
        part((0, size))
        return
    each = -(-size // threads // OF_BLOCK) * OF_BLOCK
    for _ in workers(threads).map(part, [(start, min(start + each, size)) for start in range(0, size, each)]):
        pass
