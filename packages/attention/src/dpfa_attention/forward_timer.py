"""How long a module's forward passes take, and how much memory there was."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ForwardTimer:
    """Adds up forward passes; on a GPU by its own clock, read when somebody asks.

    A copied module starts with no passes.
    """

    def __init__(self) -> None:
        self.calls, self._seconds = 0, 0.0
        self._pending: list[tuple[Any, Any]] = []

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """One pass, which counts if it ends without an error."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()  # type: ignore[no-untyped-call]
            yield
            end.record()  # type: ignore[no-untyped-call]
            self._pending.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
        self.calls += 1

    @property
    def milliseconds(self) -> float:
        """Of one pass on average; 0 before the first."""
        for start, end in self._pending:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000.0
        self._pending.clear()
        return 1000.0 * self._seconds / self.calls if self.calls else 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardTimer:
        return ForwardTimer()

    def __reduce__(self) -> Any:
        return ForwardTimer, ()


def megabytes(device: torch.device) -> float:
    """The most memory so far, in 10**6 bytes: allocated on a GPU, or resident of the process; 0 where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # there is none on Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
