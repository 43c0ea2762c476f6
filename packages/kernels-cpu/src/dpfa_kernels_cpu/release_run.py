"""The noise of a release, key stream to sum in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_kernels_cpu.library import best_level, function
from dpfa_kernels_torch.noise.release_run import check_counters
from dpfa_kernels_torch.noise.training_run import workers

SMALL = 1 << 13
"""Elements that one thread adds quicker than two can be asked to."""

LAWS = {("gaussian", "bm32"): 0, ("gaussian", "bm64"): 1, ("laplace", "bm64"): 2}
"""(distribution, transform) to the number that the library gives it."""

ROWS = 16
"""Rows whose blocks follow one another."""


class Release(ctypes.Structure):
    """The library's ``Release``: where the noise goes, and what it is scaled by."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("out_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_void_p),
        ("scale_strides", ctypes.c_int64 * 3),
        ("first_group", ctypes.c_int64),
        ("last_group", ctypes.c_int64),
        ("key", ctypes.c_char_p),
        ("number", ctypes.c_uint32 * 2),
    )


def add_release_run_(
    x: Tensor, scale: Tensor, key: NoiseKey, distribution: str, transform: str, *, level: int | None = None
) -> None:
    """Add the ChaCha20 noise of a whole release to `x` (B, S, H, columns) float32 or float64, in place.

    Guarantee: tested (float32 equal to torch's noise, float64 to rounding; every instruction set the same).
    Args: scale: float64 (B, S, H), of any strides; level: the instruction set, a number into ``LEVELS``; the
        processor's best by default.
    """
    release = check_counters(x, key)
    level = best_level() if level is None else level
    add = function("dpfa_add_release_f64" if x.dtype == torch.float64 else "dpfa_add_release_f32")
    law = LAWS[distribution, transform]
    secret = key.words.numpy().astype("<u4").tobytes()
    # columns must lie side by side
    out = x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
    B, S, H, D = out.shape
    groups = B * H * -(-S // ROWS)

    def part(bounds: tuple[int, int]) -> None:
        number = (release & 0xFFFFFFFF, release >> 32)
        place = Release(S, H, D, out.stride()[:3], scale.data_ptr(), scale.stride(), *bounds, secret, number)
        failed = add(level, law, out.data_ptr(), ctypes.byref(place))
        assert not failed, level  # noqa: S101  (a level that `best_level` gave was built)

    threads = torch.get_num_threads()
    if out.numel() <= SMALL or threads == 1:
        part((0, groups))
    else:
        each = -(-groups // threads)
        for _ in workers(threads).map(part, [(at, min(at + each, groups)) for at in range(0, groups, each)]):
            pass
    if out is not x:
        x.copy_(out)
