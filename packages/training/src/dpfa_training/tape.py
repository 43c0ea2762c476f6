"""What one backward pass leaves behind for each parameter: the inputs of the per-sample formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dpfa_core.errors import NotPrivateError


@dataclass(frozen=True)
class Note:
    """One use of a parameter: `kind` and `saved` are those of ``Backend.sqnorm``."""

    kind: str
    saved: tuple[Any, ...]


@dataclass
class Tape:
    """Notes of one forward and its one backward, over `rows` samples."""

    rows: int
    finish: Callable[[Tape], None]
    """Called once, when the backward pass that wrote the notes has ended."""
    notes: dict[str, list[Note]] = field(default_factory=dict)
    closed: bool = False

    def add(self, parameter: str, kind: str, *saved: Any) -> None:
        """Write down one use; the first dimension of every saved tensor must be the sample."""
        if self.closed:
            raise NotPrivateError(
                f"one backward per forward is supported, got a second one through {parameter!r}; add the "
                "losses and call backward once."
            )
        for item in saved:
            if isinstance(item, torch.Tensor) and item.shape[0] != self.rows:
                raise NotPrivateError(
                    f"{parameter!r} must see one row per sample in dimension 0 ({self.rows} rows), got a "
                    f"tensor of shape {tuple(item.shape)}; keep the batch dimension first, or freeze it."
                )
        if not self.notes:
            # Autograd's own end-of-backward callback, the one that distributed wrappers use.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self.notes.setdefault(parameter, []).append(Note(kind, saved))

    def _end(self) -> None:
        self.closed = True
        try:
            self.finish(self)
        finally:
            self.notes.clear()

    def merged(self) -> Iterator[tuple[str, Note]]:
        """One note for each parameter; several uses are joined so that their cross terms count."""
        for parameter, notes in self.notes.items():
            kinds = {note.kind for note in notes}
            if len(kinds) > 1:
                raise NotPrivateError(
                    f"{parameter!r} must be used in one way, got {' and '.join(sorted(kinds))}; tied weights "
                    "are not offered by this version, so give each use its own parameter."
                )
            yield parameter, notes[0] if len(notes) == 1 else _joined(notes)


def _joined(notes: list[Note]) -> Note:
    kind = notes[0].kind
    tensors = [[item for item in note.saved if isinstance(item, torch.Tensor)] for note in notes]
    constants = tuple(item for item in notes[0].saved if not isinstance(item, torch.Tensor))
    if kind == "bare":  # already the sample's gradient: uses add up
        return Note(kind, (torch.stack([one for (one,) in tensors]).sum(0),))
    rows = tensors[0][0].shape[0]
    joined = []
    for position, ids_or_values in enumerate(zip(*tensors, strict=True)):
        features = 0 if kind == "embedding" and position == 0 else 1
        flat = [item.reshape(rows, -1, *item.shape[item.dim() - features :]) for item in ids_or_values]
        joined.append(torch.cat(flat, dim=1))
    return Note(kind, (*joined, *constants))
