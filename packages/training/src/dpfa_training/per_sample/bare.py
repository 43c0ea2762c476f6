"""Bare parameters (class tokens, positions): each sample gets a copy, whose gradient is the sample's own."""

from __future__ import annotations

from typing import Any

import torch

from dpfa_training.tape import Tape


def per_sample_copy(parameter: torch.Tensor, name: str, tape: Tape, anchor: torch.Tensor) -> torch.Tensor:
    """(1, ...) as (B, ...), one copy for each sample; broadcasting and ``expand`` still work on it."""
    return _Copies.apply(parameter.detach(), anchor, tape, name)  # type: ignore[no-any-return]


def refusal(parameter: torch.Tensor) -> str:
    """Why a parameter outside the known layers is not supported; empty if it is."""
    if parameter.dim() >= 2 and parameter.shape[0] == 1:
        return ""
    return (
        f"a parameter outside the known layers must have shape (1, ...), got {tuple(parameter.shape)}; "
        "give it a leading dimension of 1 that broadcasts over the batch, or freeze it"
    )


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, anchor: torch.Tensor, tape: Tape, name: str) -> torch.Tensor:
        ctx.tape, ctx.name = tape, name
        return parameter.expand(tape.rows, *parameter.shape[1:]).clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.tape.add(ctx.name, "bare", grad.detach())
        return None, None, None, None
