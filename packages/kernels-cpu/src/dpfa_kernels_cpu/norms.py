"""Squared norms of per-sample gradients in float32, summed in float64 in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_kernels_cpu.library import best_level, function
from dpfa_kernels_torch.noise.training_run import workers
from dpfa_kernels_torch.per_sample.embedding import checked
from dpfa_kernels_torch.per_sample.rounding import UNIT, summed_bound

NONE_LEFT_OUT = -1

SMALL = 1 << 21
"""Numbers up to which one thread works: waking two costs more than it saves (two AMD EPYC cores with AVX-512, November
2026: 590000 of them take one thread 0.07 ms and two 0.14)."""


def bare_squares(gradient: Tensor, *, level: int | None = None) -> Tensor:
    """The sums of squares of `gradient` (B, ...), float32 and contiguous, from above: float64 (B,).

    Guarantee: tested (never below the sum in exact arithmetic; every instruction set the same).
    Args: level: the instruction set, a number into ``LEVELS``; the processor's best by default.
    """
    samples = len(gradient)
    width = gradient.numel() // samples if samples else 0
    result = torch.empty(samples, dtype=torch.float64)
    level = best_level() if level is None else level
    run = function("dpfa_bare_squares")

    def part(start: int, stop: int) -> None:
        numbers, sums = gradient.data_ptr() + 4 * start * width, result.data_ptr() + 8 * start
        failed = run(level, numbers, stop - start, width, sums)
        assert not failed, level  # noqa: S101  (a level that `best_level` gave was built)

    threads = torch.get_num_threads()
    if gradient.numel() <= SMALL or threads == 1 or samples == 1:
        part(0, samples)
    else:
        each = -(-samples // threads)
        starts = range(0, samples, each)
        for _ in workers(threads).map(part, starts, [min(start + each, samples) for start in starts]):
            pass
    return result * (1.0 + 2 * width * UNIT)


def embedding_squares(ids: Tensor, g: Tensor, rows: int, padding: int | None, *, level: int | None = None) -> Tensor:
    """The squared norms of an embedding table's gradients from above: float64 (B,).

    Guarantee: tested (never below the norm in exact arithmetic; every instruction set the same).
    Args:
        ids: token ids (B, T); g: the output's gradient (B, T, d), float32.
        rows, padding: of the table.
        level: as above.
    """
    ids, g, _, padding = checked((ids, g, rows, padding))
    B, T, d = g.shape
    ids, order = ids.sort(dim=1)
    ids, order, g = ids.contiguous(), order.contiguous(), g.contiguous()
    total = torch.empty(d, dtype=torch.float64)
    squares, spread = torch.empty(B, dtype=torch.float64), torch.empty(B, dtype=torch.float64)
    level = best_level() if level is None else level
    failed = function("dpfa_embedding_squares")(
        level,
        g.data_ptr(),
        ids.data_ptr(),
        order.data_ptr(),
        NONE_LEFT_OUT if padding is None else padding,
        B,
        T,
        d,
        total.data_ptr(),
        squares.data_ptr(),
        spread.data_ptr(),
    )
    assert not failed, level  # noqa: S101  (as above)
    return summed_bound(squares.sqrt(), T, spread)
