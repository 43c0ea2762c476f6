"""Layer normalisation: the scale's gradient is ``sum_t g_t * xhat_t``, the shift's ``sum_t g_t``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.linear import Call, split
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.use import Use, register
from dpfa_training.per_sample.uses import autocast_dtype


@register(F.layer_norm)
def layer_norm(
    use: Use, input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """``F.layer_norm`` over the last dimensions."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim >= input.dim() - len(normalized_shape):
        raise use.unknown("only over dimensions that do not count samples")
    call, values = split(weight, bias, samples, use.rows)
    return _Normalise.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, *values, use.uses.anchor, tuple(normalized_shape), eps, call
    )


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor,
        shape: tuple[int, ...],
        eps: float,
        call: Call,
    ) -> Tensor:
        ctx.dtype = x.dtype
        if autocast_dtype(x) is not None:
            x = x.float()
        out, mean, inverse_std = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse_std, weight)
        ctx.shape, ctx.call = shape, call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, inverse_std, weight = ctx.saved_tensors
        if ctx.call.to_weight is not None:
            ctx.call.to_weight.note("bare", _sample_sum((x - mean).mul_(inverse_std).mul_(grad), ctx.call, ctx.shape))
        if ctx.call.to_bias is not None:
            ctx.call.to_bias.note("bare", _sample_sum(grad, ctx.call, ctx.shape))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, ctx.shape, mean, inverse_std, weight, None, [True, False, False]
            )[0].to(ctx.dtype)
        return grad_x, None, None, None, None, None, None


def _sample_sum(terms: Tensor, call: Call, shape: tuple[int, ...]) -> Tensor:
    terms = call.samples.first(terms, call.rows).reshape(call.rows, -1, *shape)
    return terms.sum(1, dtype=torch.promote_types(terms.dtype, torch.float32))
