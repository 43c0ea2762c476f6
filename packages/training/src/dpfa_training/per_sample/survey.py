"""Two forwards with different numbers of samples show which dimension of every operand counts the samples.

A size that equals the batch size by chance (as many positions as samples) is never taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from dpfa_training.per_sample.counting import Counting
from dpfa_training.per_sample.samples import Samples, find
from dpfa_training.per_sample.uses import Key

Seen = tuple[tuple[torch.Size | None, Literal["", "major", "minor"]], ...]


@dataclass
class Log:
    """Shapes of the operands of every use in one forward over `rows` samples.

    The first two samples are equal if `twins`: that tells (B*T, ...) from (T*B, ...).
    """

    rows: int
    twins: bool
    seen: dict[Key, list[Seen]] = field(default_factory=dict)
    owners: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    counting: Counting = field(default_factory=Counting)
    passed_over: bool = False
    """Whether something ran without gradient: checkpointed blocks do, until backward computes them again."""

    def add(self, key: Key, parameters: tuple[str, ...], operands: Sequence[torch.Tensor]) -> None:
        """Write down one use."""
        self.owners[key] = parameters
        self.counting.aside += 1
        seen = tuple((None if self.counting.chosen(x) else x.shape, self._joined(x)) for x in operands)
        self.counting.aside -= 1
        self.seen.setdefault(key, []).append(seen)  # type: ignore[arg-type]

    def _joined(self, x: torch.Tensor) -> str:
        if not self.twins or x.dim() == 0 or x.shape[0] <= self.rows or x.shape[0] % self.rows:
            return ""
        values = x.detach().double()
        major, minor = values.unflatten(0, (self.rows, -1)), values.unflatten(0, (-1, self.rows))  # type: ignore[no-untyped-call]
        far = {
            "major": float((major[0] - major[1]).abs().max()),
            "minor": float((minor[:, 0] - minor[:, 1]).abs().max()),
        }
        best = min(far, key=far.__getitem__)
        return best if far[best] <= 1e-3 * float(values.abs().max()) else ""


def compare(few: Log, more: Log) -> tuple[dict[Key, tuple[Samples | None, ...]], dict[Key, str]]:
    """(layouts of the uses, reasons for those without one)."""
    layouts: dict[Key, tuple[Samples | None, ...]] = {}
    refused: dict[Key, str] = {}
    for key in few.seen.keys() | more.seen.keys():
        found = [
            _layout(a, few.rows, b, more.rows)
            for a, b in zip(few.seen.get(key, ()), more.seen.get(key, ()), strict=False)
        ]
        if len(set(found)) == 1 and None not in found:
            layouts[key] = tuple(_together(one) for one in zip(*found, strict=True))
        else:
            refused[key] = (
                "its operands do not follow the number of samples in one way, or their rows are chosen by content"
            )
    return layouts, refused


def _together(layouts: tuple[Samples | None, ...]) -> Samples | None:
    first = layouts[0]
    if first is None:
        return None
    return replace(first, times=frozenset().union(*(layout.times for layout in layouts if layout is not None)))


def _layout(few: Seen, few_rows: int, more: Seen, more_rows: int) -> Any:
    if len(few) != len(more):
        return None
    if any(shape is None for shape, _ in (*few, *more)):
        return None  # rows chosen by content
    try:
        return tuple(find(a, few_rows, b, more_rows, joined) for (a, _), (b, joined) in zip(few, more, strict=True))  # type: ignore[arg-type]
    except ValueError:
        return None
