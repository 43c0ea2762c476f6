"""From a finished tape to clipped gradient sums: every sample's norm, its factor, and one weighted sum.

A weight's gradient in each sample is formed where that is quickest (``forming``): during the backward where all
of them fit, else afterwards, samples in blocks of bounded memory. What is measured is exactly what is summed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from dpfa_training.bare_notes import bare_notes
from dpfa_training.clipping import Clipping
from dpfa_training.forming import BLOCK, Forming, is_formed, shape_of
from dpfa_training.pieces import add_joined, cut
from dpfa_training.tape import Note, Tape
from dpfa_training.units import joined


class ClippedSums:
    """Adds up clipped gradients.

    Guarantee: tested. Each sample adds at most its threshold in l2 norm, jointly over the parameters of a group.
    A sample whose gradient is not finite adds nothing; its norm is reported as it is.
    Source: Abadi et al. 2016, Algorithm 1; Bu et al. 2023 (book-keeping).
    """

    def __init__(self, backend: Any, clipping: Clipping) -> None:
        self.backend, self.clipping = backend, clipping

    def form_during(self, tape: Tape) -> None:
        """Form gradients while the backward of `tape` runs, where its rows are samples."""
        if "per_sample" not in self.backend.ops or self.clipping.cuts:
            return
        tape.forming = Forming(self.backend, lambda name, note: self._form(name, note, slice(None)))

    def add(
        self,
        tape: Tape,
        sums: dict[str, torch.Tensor],
        *,
        weights: torch.Tensor,
        scale: float,
        units: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add this batch to `sums` ({parameter: float32, shaped by the backend}).

        Args:
            weights: (B,) 1 for a sample of the draw, 0 for padding.
            scale: what turns the noted gradients into those of the samples' own losses (rows under "mean").
            units: (rows,) the unit of each row, whose gradients are one sample's; None where a row is a sample.
        Returns: norms before clipping (groups, B) float64, B the number of units.
        """
        notes = cut(tape.merged(), self.clipping.cuts)
        whole, sums = sums, {} if self.clipping.cuts else sums
        samples = tape.rows
        if units is not None:
            notes = {name: joined(note, units) for name, note in notes.items()}
            samples = int(units[-1]) + 1
            weights = weights.new_zeros(samples).scatter_(0, units, weights)  # alike within a unit
        to_form = {name: note for name, note in notes.items() if "per_sample" in self.backend.ops and is_formed(note)}
        bare = bare_notes(notes, self.clipping)
        others = {name: note for name, note in notes.items() if name not in to_form and note.kind != "bare"}
        squares = weights.new_zeros(len(self.clipping.thresholds), samples, dtype=torch.float64)
        for name, note in others.items():
            squares[self.clipping.group(name)] += self.backend.sqnorm(note.kind, note.saved).double()
        for one in bare:
            squares[one.group] += self.backend.sqnorm("bare", one.note.saved).double()
        formed = {} if tape.forming is None else tape.forming.gradients
        for name in formed:
            squares[self.clipping.group(name)] += tape.forming.squares(name)
        weights = weights.to(squares)
        factors = torch.empty_like(squares)
        for block in self._blocks(samples, to_form):
            gradients = {name: gradient[block] for name, gradient in formed.items()}
            for name, note in to_form.items():
                gradient = gradients[name] = self._form(name, note, block)
                # while the cache still has it
                squares[self.clipping.group(name), block] += self.backend.sqnorm("bare", (gradient,)).double()
            own = self.clipping.factors(squares[:, block].sqrt() * scale) * (scale * weights[block])
            factors[:, block] = own
            finite = squares[:, block].isfinite().all(0)
            for name, gradient in gradients.items():
                if not bool(finite.all()):
                    gradient[~finite] = 0.0  # a factor of 0 would leave NaN
                _accumulate(sums, name, gradient, own[self.clipping.group(name)])
        finite = squares.isfinite().all(0)
        for name, note in others.items():
            kept = note if bool(finite.all()) else _without(note, finite)
            self._add(sums, name, kept, factors[self.clipping.group(name)].float())
        for one in bare:
            kept = one.note if bool(finite.all()) else _without(one.note, finite)
            total = self.backend.clipped_grad("bare", kept.saved, factors[one.group].float())
            for name, part in one.part(total).items():
                sums[name] = part if name not in sums else sums[name].add_(part)
        if sums is not whole:
            add_joined(sums, self.clipping.cuts, whole)
        return squares.sqrt() * scale

    def _add(self, sums: dict[str, torch.Tensor], name: str, note: Note, factors: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = self.backend.clipped_grad(note.kind, note.saved, factors)
        elif "per_sample" in self.backend.ops:
            self.backend.add_clipped_grad_(sums[name], note.kind, note.saved, factors)
        else:
            sums[name] += self.backend.clipped_grad(note.kind, note.saved, factors)

    def _blocks(self, rows: int, to_form: dict[str, Note]) -> list[slice]:
        numbers = sum(math.prod(shape_of(note)) for note in to_form.values())
        if not numbers:
            return [slice(0, rows)]
        step = -(-rows // -(-rows // max(1, BLOCK // numbers)))  # as even as can be
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _form(self, name: str, note: Note, block: slice) -> torch.Tensor:
        saved = tuple(item[block] if isinstance(item, torch.Tensor) else item for item in note.saved)
        result: torch.Tensor = self.backend.per_sample_grad(note.kind, saved)
        return result


def _accumulate(sums: dict[str, torch.Tensor], name: str, gradient: torch.Tensor, factors: torch.Tensor) -> None:
    total = sums.get(name)
    if total is None:
        total = sums[name] = torch.zeros(gradient.shape[1:], dtype=gradient.dtype, device=gradient.device)
    if len(gradient) == 1:
        total.add_(gradient[0], alpha=float(factors[0]))
    else:
        total.view(1, -1).addmm_(factors.to(gradient.dtype).unsqueeze(0), gradient.reshape(len(gradient), -1))


def _without(note: Note, keep: torch.Tensor) -> Note:
    """The note with the rows of the other samples set to zero."""

    def zeroed(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        return torch.where(keep.view(-1, *[1] * (item.dim() - 1)), item, torch.zeros_like(item))

    return replace(note, saved=tuple(zeroed(item) for item in note.saved))
