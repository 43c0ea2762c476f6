"""Linear layers: sample i's weight gradient is ``G_i^T A_i``, its bias gradient ``sum_t g_it``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dpfa_training.tape import Tape


class LinearRule:
    """``nn.Linear`` on (B, ..., d)."""

    def refusal(self, module: nn.Linear) -> str:
        return ""

    def forward(self, module: nn.Linear, names: dict[str, str], tape: Tape, anchor: torch.Tensor) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.detach()
            return affine(x, module.weight.detach(), bias, anchor, tape, names)

        return run


def affine(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    anchor: torch.Tensor,
    tape: Tape,
    names: dict[str, str],
) -> torch.Tensor:
    """``x W^T + b`` of detached parameters; `anchor` makes backward run for inputs without gradient."""
    return _Affine.apply(x, weight, bias, anchor, tape, names)  # type: ignore[no-any-return]


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        anchor: torch.Tensor,
        tape: Tape,
        names: dict[str, str],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.names = tape, names
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if "weight" in ctx.names:
            ctx.tape.add(ctx.names["weight"], "linear", tokens(x), tokens(grad))
        if "bias" in ctx.names:
            ctx.tape.add(ctx.names["bias"], "shift", tokens(grad))
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


def tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, ..., d) as (B, T, d)."""
    return x.detach().reshape(x.shape[0], -1, x.shape[-1]) if x.dim() != 3 else x.detach()
