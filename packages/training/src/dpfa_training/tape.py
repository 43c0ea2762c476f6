"""What one backward pass leaves behind for each parameter: the inputs of the per-sample formulas."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample.materialise import materialise


@dataclass(frozen=True)
class Note:
    """One use of a parameter: `kind` and `saved` are those of ``Backend.sqnorm``."""

    kind: str
    saved: tuple[Any, ...]


class Taking(Protocol):
    """Deals with uses as they come, so that they need not be kept."""

    gradients: dict[str, torch.Tensor]

    def take(self, tape: Tape, parameter: str, note: Note) -> bool:
        """Whether this use is dealt with; else it becomes a note."""
        ...

    def squares(self, parameter: str) -> torch.Tensor:
        """(rows,) squared norms of what it has dealt with."""
        ...


@dataclass(eq=False)
class Tape:
    """Notes of one forward and its one backward, over `rows` samples."""

    rows: int
    finish: Callable[[Tape], None]
    """Called once, when the backward pass that wrote the notes has ended."""
    notes: dict[str, list[Note]] = field(default_factory=dict)
    forming: Taking | None = None
    expected: Counter[str] = field(default_factory=Counter)
    """Uses of a parameter that the forward saw and the backward has not reached."""
    formed_sizes: dict[str, int] = field(default_factory=dict)
    """Numbers of each parameter that is the weight of a matrix product."""
    begun: bool = False
    closed: bool = False
    held: bool = False
    """Whether what arrives belongs to a look at the loss and not to its backward."""
    on_begin: Callable[[], None] = lambda: None
    on_end: Callable[[], None] = lambda: None

    def watch(self, output: Any) -> None:
        """Begin when a gradient reaches one of the tensors in `output`.

        There the callback belongs to the outermost backward; a checkpointed block that recomputes runs a
        backward of its own inside.
        """
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(self._reached)  # type: ignore[no-untyped-call]

    def expect(self, parameter: str, numbers: int = 0) -> None:
        """The forward uses a parameter, as the weight of a matrix product where `numbers` is its size."""
        self.expected[parameter] += 1
        if numbers:
            self.formed_sizes[parameter] = numbers

    def add(self, parameter: str, kind: str, *saved: Any) -> None:
        """Write down one use; the first dimension of every saved tensor must be the sample."""
        if self.held:
            return
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
        self._begin()
        plain = tuple(item.detach() if isinstance(item, torch.Tensor) else item for item in saved)
        note = Note(kind, plain)
        if self.forming is None or not self.forming.take(self, parameter, note):
            self.notes.setdefault(parameter, []).append(note)

    def _reached(self, grad: torch.Tensor) -> None:
        self._begin()

    def hold(self, held: bool) -> None:
        """Take no notes, or take them again."""
        self.held = held

    def _begin(self) -> None:
        if not (self.begun or self.held):
            self.begun = True
            _running.add(self)
            # Autograd's own end-of-backward callback, the one that distributed wrappers use.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self.on_begin()

    def _end(self) -> None:
        self.closed = True
        _running.discard(self)
        self.on_end()
        try:
            self.finish(self)
        finally:
            self.notes.clear()
            self.forming = None

    def give_up(self) -> None:
        """Its backward failed, and nothing of it will be used."""
        self.closed = True
        _running.discard(self)
        self.notes.clear()
        self.forming = None
        self.on_end()

    def merged(self) -> Iterator[tuple[str, Note]]:
        """One note for each parameter; several uses are joined so that their cross terms count."""
        for parameter, notes in self.notes.items():
            yield parameter, notes[0] if len(notes) == 1 else _merged(notes)


_running: weakref.WeakSet[Tape] = weakref.WeakSet()
"""Tapes whose backward has begun; autograd does not tell them when it fails."""


def give_up() -> None:
    """A backward failed: what it had begun is over, and the modules hold their own parameters again."""
    for tape in tuple(_running):
        tape.give_up()


def _merged(notes: list[Note]) -> Note:
    kinds: dict[str, list[Note]] = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note)
    joined = {kind: _joined(some) for kind, some in kinds.items()}
    if len(joined) == 1:
        return next(iter(joined.values()))
    if joined.keys() == {"embedding", "linear"}:
        ids, g_in, rows, padding = joined["embedding"].saved
        a, g = joined["linear"].saved
        if g.shape[2] == rows and a.shape[2] == g_in.shape[2]:
            return Note("tied", (ids, g_in, rows, padding, a, g))
    shape = _shape(joined)
    return Note("bare", (sum(materialise(kind, note.saved, shape) for kind, note in joined.items()),))


def _shape(joined: dict[str, Note]) -> tuple[int, ...]:
    if "bare" in joined:
        return tuple(joined["bare"].saved[0].shape[1:])
    a, g = joined["linear"].saved
    return g.shape[2], a.shape[2]


def _joined(notes: list[Note]) -> Note:
    kind = notes[0].kind
    if len(notes) == 1:
        return notes[0]
    if kind == "bare":  # already the sample's gradient: uses add up
        total = notes[0].saved[0]
        for note in notes[1:]:
            total = total + note.saved[0].reshape(total.shape)
        return Note(kind, (total,))
    if kind == "embedding":
        rows = notes[0].saved[2]
        paddings = {note.saved[3] for note in notes}
        padding = paddings.pop() if len(paddings) == 1 else None
        ids = torch.cat([note.saved[0] for note in notes], 1)
        return Note(kind, (ids, torch.cat([_unpadded(note, padding) for note in notes], 1), rows, padding))
    return Note(kind, tuple(torch.cat(items, 1) for items in zip(*(note.saved for note in notes), strict=True)))


def _unpadded(note: Note, padding: int | None) -> torch.Tensor:
    ids, g, _, own = note.saved
    if own is None or own == padding:
        return g  # type: ignore[no-any-return]
    return g.masked_fill((ids == own).unsqueeze(-1), 0.0)  # type: ignore[no-any-return]
