"""Layer normalisation: the scale's gradient is ``sum_t g_t * xhat_t``, the shift's ``sum_t g_t``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpfa_training.per_sample.linear import tokens
from dpfa_training.tape import Tape


class LayerNormRule:
    """``nn.LayerNorm`` over the last dimension of (B, ..., d)."""

    def refusal(self, module: nn.LayerNorm) -> str:
        if len(module.normalized_shape) != 1:
            return "only a LayerNorm over the last dimension is supported; freeze it or flatten that part"
        return ""

    def forward(self, module: nn.LayerNorm, names: dict[str, str], tape: Tape, anchor: torch.Tensor) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            weight = None if module.weight is None else module.weight.detach()
            bias = None if module.bias is None else module.bias.detach()
            return _Normalise.apply(x, weight, bias, module.eps, anchor, tape, names)  # type: ignore[no-any-return]

        return run


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        anchor: torch.Tensor,
        tape: Tape,
        names: dict[str, str],
    ) -> torch.Tensor:
        out, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse_std, weight)
        ctx.tape, ctx.names = tape, names
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, mean, inverse_std, weight = ctx.saved_tensors
        if "weight" in ctx.names:
            normalised = (x - mean) * inverse_std
            ctx.tape.add(ctx.names["weight"], "scale", tokens(normalised), tokens(grad))
        if "bias" in ctx.names:
            ctx.tape.add(ctx.names["bias"], "shift", tokens(grad))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], mean, inverse_std, weight, None, [True, False, False]
            )[0]
        return grad_x, None, None, None, None, None, None
