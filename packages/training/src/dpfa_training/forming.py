"""Per-sample gradients formed while backward runs: what they are made of is given back at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dpfa_training.per_sample.materialise import materialise
from dpfa_training.tape import Note, Tape

BLOCK = 1 << 25
"""Numbers of per-sample gradients held at a time, or one sample's if that is more: 128 MiB (two Intel cores,
November 2026: at an eighth of it an encoder of 5 million weights needs 357 ms a batch instead of 183)."""

SHORT = 16
"""Numbers moved for a formed gradient cost as much as so many operations of the Gram form for each of them."""

Form = Callable[[str, Note], torch.Tensor]


class Forming:
    """What one backward has formed so far, with its norms; only where all of it fits into ``BLOCK``.

    Guarantee: tested (equal to the gradients formed after the backward).
    Args:
        form: (parameter, note) to (rows, *shape) float32.
    """

    def __init__(self, backend: Any, form: Form) -> None:
        self._backend, self._form = backend, form
        self.gradients: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def take(self, tape: Tape, parameter: str, note: Note) -> bool:
        """Whether this use is dealt with; else it is a note like others."""
        if parameter in self.gradients:
            self._squares.pop(parameter, None)
            self._add(self.gradients[parameter], note)
        elif self._begins(tape, parameter, note):
            self.gradients[parameter] = self._form(parameter, note)
        else:
            return False
        tape.expected[parameter] -= 1
        if not tape.expected[parameter]:
            self.squares(parameter)  # while the cache still has it
        return True

    def squares(self, parameter: str) -> torch.Tensor:
        """(rows,) float64 squared norms from above."""
        if parameter not in self._squares:
            found = self._backend.sqnorm("bare", (self.gradients[parameter],))
            self._squares[parameter] = found.double()
        return self._squares[parameter]

    def _begins(self, tape: Tape, parameter: str, note: Note) -> bool:
        fits = tape.rows * sum(tape.formed_sizes.values()) <= BLOCK
        return fits and parameter in tape.formed_sizes and parameter not in tape.notes and is_formed(note)

    def _add(self, gradient: torch.Tensor, note: Note) -> None:
        if note.kind == "linear":
            gradient += self._backend.per_sample_grad("linear", note.saved)
        elif note.kind == "embedding":
            ids, g, rows, padding = note.saved
            terms = g.to(gradient.dtype)
            if padding is not None:
                terms = torch.where((ids == padding).unsqueeze(-1), 0.0, terms)
            index = ids.long() + rows * torch.arange(len(ids), device=ids.device).unsqueeze(-1)
            gradient.view(-1, g.shape[-1]).index_add_(0, index.flatten(), terms.flatten(0, 1))
        else:
            gradient += materialise(note.kind, note.saved, gradient.shape[1:]).reshape(gradient.shape)


def is_formed(note: Note) -> bool:
    """Whether forming a weight's gradient in each sample is the quickest way to its norm and to the sum.

    Both ways multiply ``2 T d p`` for the sum. Forming moves ``d p`` numbers to memory and back; the norm without
    it, by the Gram form, multiplies ``T**2 (d + p)`` in float64.
    """
    if note.kind == "tied":
        return math.prod(shape_of(note)) <= BLOCK
    if note.kind != "linear":
        return False
    p, d = shape_of(note)
    length = note.saved[0].shape[1]
    return d * p <= BLOCK and length * length * (d + p) > SHORT * d * p


def shape_of(note: Note) -> tuple[int, int]:
    """Of one sample's gradient."""
    if note.kind == "tied":
        return note.saved[2], note.saved[1].shape[-1]
    return note.saved[1].shape[-1], note.saved[0].shape[-1]
