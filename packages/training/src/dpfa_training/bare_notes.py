"""Parameters whose per-sample gradients are there already, in one matrix for each group: few large operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dpfa_training.clipping import Clipping
from dpfa_training.tape import Note

COLUMNS = 128
"""The matrix is filled up with zeros to a multiple of it, which norms are computed by."""


@dataclass(frozen=True)
class BareNotes:
    """Biases, scales, positions of one clipping group: usually many, and small."""

    group: int
    shapes: dict[str, torch.Size]
    """Of one sample's gradient, by parameter, in the order of the matrix."""
    note: Note

    def part(self, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weighted sum over the samples, by parameter."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = total.split([*sizes, len(total) - sum(sizes)])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=False)}


def bare_notes(notes: dict[str, Note], clipping: Clipping) -> list[BareNotes]:
    """The bare notes, joined by group."""
    found = []
    for group in range(len(clipping.thresholds)):
        own = {name: note.saved[0] for name, note in notes.items() if note.kind == "bare"}
        own = {name: gradient for name, gradient in own.items() if clipping.group(name) == group}
        if own:
            shapes = {name: gradient.shape[1:] for name, gradient in own.items()}
            flat = [gradient.reshape(len(gradient), -1) for gradient in own.values()]
            missing = -sum(one.shape[1] for one in flat) % COLUMNS
            flat.append(flat[0].new_zeros(len(flat[0]), missing))
            found.append(BareNotes(group, shapes, Note("bare", (torch.cat(flat, 1),))))
    return found
