"""Flat clipping: one norm for each sample over all parameters, then one clipped sum for each parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dpfa_training.tape import Note, Tape

ROUNDING = 1 - 2.0**-22
"""Clip factors are lowered by more than the error of rounding them to float32."""


def clipped_sums(
    backend: Any, tape: Tape, *, weights: torch.Tensor, max_grad_norm: float, scale: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The clipped gradient sums of a finished tape, and every sample's norm bound.

    Guarantee: tested. Each sample adds at most ``max_grad_norm`` in l2 norm to the sums, jointly over all
    parameters. A sample whose gradient is not finite adds nothing; its norm is reported as it is.

    Args:
        weights: (B,) 1 for a sample of the draw, 0 for padding.
        scale: what turns the noted gradients into those of the samples' own losses (B under "mean").

    Returns: ({parameter: float32 sum in the backend's shape}, norms (B,) float64).
    Source: Abadi et al. 2016, Algorithm 1; Bu et al. 2023 (book-keeping).
    """
    notes = dict(tape.merged())
    squares = [backend.sqnorm(note.kind, note.saved).double() for note in notes.values()]
    norms = torch.stack(squares).sum(0).sqrt() * scale
    finite = norms.isfinite()
    if not bool(finite.all()):
        notes = {name: _without(note, finite) for name, note in notes.items()}
    shrink = (max_grad_norm / norms.clamp_min(torch.finfo(torch.float64).tiny)) * ROUNDING
    factors = torch.where(norms <= max_grad_norm, torch.ones_like(norms), shrink)
    factors = torch.where(finite, factors * scale * weights.to(norms), torch.zeros_like(norms)).float()
    sums = {name: backend.clipped_grad(note.kind, note.saved, factors) for name, note in notes.items()}
    return sums, norms


def _without(note: Note, keep: torch.Tensor) -> Note:
    """The note with the rows of the other samples set to zero (a factor of 0 would leave NaN)."""

    def zeroed(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        return torch.where(keep.view(-1, *[1] * (item.dim() - 1)), item, torch.zeros_like(item))

    return replace(note, saved=tuple(zeroed(item) for item in note.saved))
