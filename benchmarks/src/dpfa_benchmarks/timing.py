"""Seconds per step of several contenders that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dpfa_benchmarks.case import Step


def interleaved(
    steps: Mapping[str, Step], *, warmups: int, repeats: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Rounds A B C, A B C, ...: entry r of every list was measured in round r.

    Args:
        warmups: rounds that are run and not kept.
        advance: called after each step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmups + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            stop = time.perf_counter()
            if turn >= warmups:
                seconds[name].append(stop - start)
            advance()
    return seconds
