"""How many rows to hold at once: what fits, from what two small parts keep for their backward, then by the clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dpfa_training.sampling.part_timing import PartTiming

SHARE = 0.25
"""Of the memory that is free, what one physical batch may keep; a public constant."""
COPIES = 2
"""Each tensor kept for the backward is joined by a gradient of its size."""
FIRST = (2, 4)
"""Rows of the first physical batch, and of those that follow until it is known what a row keeps."""


class MemoryProbe:
    """Chooses the size of physical batches during the first draws; the draws and their noise stay the same.

    Args:
        module: whose forward is watched.
        timed: try several sizes that fit, as ``clipped`` tells their times; else take all that fits.
        free: bytes available on the module's device.
    """

    def __init__(
        self, module: nn.Module, *, timed: bool = False, free: Callable[[nn.Module], int] | None = None
    ) -> None:
        self._module = module
        self.chosen: int | None = None
        """Rows in a physical batch from here on; None until it is chosen."""
        self._timed, self._free = timed, free or free_bytes
        self._timing: PartTiming | None = None
        self._asked = False
        self._rows = 0
        self._kept: dict[int, int] = {}
        self._watching: saved_tensors_hooks | None = None
        self._storages: dict[int, int] = {}
        self._hooks = (
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        )

    def rows(self) -> int:
        """The largest physical batch at the moment."""
        if self.chosen is not None:
            return self.chosen
        if self._timing is not None:
            return self._timing.rows()
        first, self._asked = not self._asked, True
        return FIRST[0] if first else FIRST[1]

    def expect(self, rows: int) -> None:
        """The next forward sees `rows` rows."""
        self._rows = rows

    def clipped(self, rows: int, seconds: float) -> None:
        """Forward, backward and clip of a physical batch of `rows` rows took that long."""
        if self._timing is not None and self.chosen is None:
            self._timing.took(rows, seconds)
            self.chosen = self._timing.chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryProbe:
        """A copied model is an ordinary model: its hooks lead here and are ignored."""
        return self

    def _begin(self, module: nn.Module, args: Any) -> None:
        undecided = self.chosen is None and self._timing is None
        wanted = self._rows and undecided and module is self._module
        if wanted and module.training and torch.is_grad_enabled():
            self._storages = {}
            self._watching = saved_tensors_hooks(self._keep, lambda tensor: tensor)
            self._watching.__enter__()

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watching is None:
            return
        self._watching.__exit__(None, None, None)
        self._watching = None
        self._kept[self._rows] = sum(self._storages.values())
        self._rows = 0
        if len(self._kept) == len(FIRST):
            self._choose(module)

    def _choose(self, module: nn.Module) -> None:
        (few, small), (many, large) = sorted(self._kept.items())
        each = max(1, (large - small) // (many - few)) * COPIES
        fitting = max(FIRST[0], int(SHARE * self._free(module)) // each)
        if self._timed:
            self._timing = PartTiming(FIRST[0], fitting)
        else:
            self.chosen = fitting
        for hook in self._hooks:
            hook.remove()


def free_bytes(module: nn.Module) -> int:
    """Memory that is free on the device of `module`: of the GPU, or what system and container leave."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_available()]
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min(found)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
