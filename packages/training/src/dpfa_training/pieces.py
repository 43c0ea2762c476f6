"""Parameters whose rows or columns are clipped in groups of their own: notes in pieces, and their sums joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dpfa_core.errors import NotPrivateError
from dpfa_training.clipping import Cut
from dpfa_training.tape import Note


def cut(notes: Iterable[tuple[str, Note]], cuts: Mapping[str, Cut]) -> dict[str, Note]:
    """The notes by parameter, those of a cut parameter as one note for each of its pieces.

    Raises: NotPrivateError for a use that has no rows or columns of its own.
    """
    found: dict[str, Note] = {}
    for name, note in notes:
        if name not in cuts:
            found[name] = note
            continue
        sizes, axis = list(cuts[name].sizes), cuts[name].axis
        parts: list[tuple[Any, ...]]
        if note.kind == "linear":  # the parameter's columns are those of the inputs, its rows those of the gradients
            inputs, gradients = note.saved
            if axis == 1:
                parts = [(part, gradients) for part in inputs.split(sizes, -1)]
            else:
                parts = [(inputs, part) for part in gradients.split(sizes, -1)]
        elif note.kind == "bare":
            parts = [(part,) for part in note.saved[0].split(sizes, 1 + axis)]
        else:
            raise NotPrivateError(
                f'clipping="per_head" cannot cut {name!r}, which is used as a {note.kind!r}; use clipping="per_layer".'
            )
        pieces = cuts[name].names(name)
        found |= {piece: Note(note.kind, part) for piece, part in zip(pieces, parts, strict=True)}
    return found


def add_joined(sums: Mapping[str, torch.Tensor], cuts: Mapping[str, Cut], whole: dict[str, torch.Tensor]) -> None:
    """Add sums by piece to `whole` by parameter."""
    pieces = {piece for name, cut in cuts.items() for piece in cut.names(name)}
    joined = {name: total for name, total in sums.items() if name not in pieces}
    for name, one in cuts.items():
        parts = [sums[piece] for piece in one.names(name) if piece in sums]
        if parts:
            joined[name] = torch.cat(parts, one.axis)
    for name, total in joined.items():
        whole[name] = total if name not in whole else whole[name] + total.reshape(whole[name].shape)
