"""Matrix products with a weight: sample i's gradient is ``G_i^T A_i``, that of a bias ``sum_t g_it``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.derived import transposed
from dpfa_training.per_sample.elementwise import elementwise
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.samples import Samples
from dpfa_training.per_sample.use import Use, register
from dpfa_training.per_sample.uses import autocast_dtype


@register(F.linear)
def linear(use: Use, input: Any, weight: Any, bias: Any = None) -> Tensor:
    """``F.linear`` on (..., d)."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim == input.dim() - 1 or _batched(use, weight) or _batched(use, bias):
        raise use.unknown("weight and bias must be parameters, the input the batch's")
    # a proxy's own methods take the long way through its __torch_function__
    if (weight.value if isinstance(weight, Proxy) else weight).dim() == 1:
        return affine(use, input, weight.unsqueeze(0), bias, samples).squeeze(-1)
    return affine(use, input, weight, bias, samples)


@register(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def matmul(use: Use, input: Any, other: Any, *, out: None = None) -> Tensor:
    """``x @ W`` and ``W @ x``; stacks of matrices are repeated for each sample."""
    if use.function is torch.Tensor.__rmatmul__:
        return _matmul(use, other, input)
    return _matmul(use, input, other)


def _matmul(use: Use, input: Any, other: Any) -> Tensor:
    if isinstance(other, Proxy) and not isinstance(input, Proxy) and input.dim() >= 2:
        if other.dim() == 1:
            return linear(use, input, other)  # type: ignore[no-any-return]
        if other.dim() == 2:
            return linear(use, input, transposed(other))  # type: ignore[no-any-return]
    if isinstance(input, Proxy) and not isinstance(other, Proxy) and input.dim() == 2 and other.dim() >= 3:
        samples = use.samples(other)
        if samples is not None and samples.dim < other.dim() - 2:
            return affine(use, other.mT, input, None, samples).mT
    if any(isinstance(item, Proxy) and item.value.dim() < 3 for item in (input, other)):
        raise use.unknown()
    return elementwise(use, input, other, matrices=True)  # type: ignore[no-any-return]


register(torch.Tensor.__rmatmul__)(matmul)


@register(torch.addmm, torch.Tensor.addmm)
def addmm(use: Use, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``bias + x @ W``, the affine map of GPT-2's Conv1D."""
    if beta != 1 or alpha != 1 or not (isinstance(input, Proxy) and input.dim() == 1):
        raise use.unknown("only bias + x @ weight")
    return linear(use, mat1, transposed(mat2), input)  # type: ignore[no-any-return]


def affine(use: Use, x: Tensor, weight: Any, bias: Any, samples: Samples) -> Tensor:
    """``x W^T + b``; weight and bias are proxies or frozen."""
    call, values = split(weight, bias, samples, use.rows)
    return _Affine.apply(x, *values, use.uses.anchor, call)  # type: ignore[no-any-return, no-untyped-call]


class Call(NamedTuple):
    """What backward needs besides tensors; one object, as each argument of an autograd function costs time."""

    samples: Samples
    rows: int
    to_weight: Any
    to_bias: Any


def split(weight: Any, bias: Any, samples: Samples, rows: int) -> tuple[Call, tuple[Tensor, Tensor | None]]:
    """Where the gradients of weight and bias go, None for one that is frozen, and the plain tensors."""
    to_weight = weight if isinstance(weight, Proxy) else None
    to_bias = bias if isinstance(bias, Proxy) else None
    values = (weight if to_weight is None else to_weight.value, bias if to_bias is None else to_bias.value)
    return Call(samples, rows, to_weight, to_bias), values


def _batched(use: Use, item: Any) -> bool:
    return item is not None and not isinstance(item, Proxy) and use.samples(item) is not None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        call: Call,
    ) -> Tensor:
        ctx.dtype = x.dtype
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(None if call.to_weight is None else x, weight)
        ctx.call = call
        if call.to_weight is not None:
            call.to_weight.expect(product=True)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        call = ctx.call
        g = call.samples.tokens(grad, call.rows)
        if call.to_weight is not None:
            call.to_weight.note("linear", call.samples.tokens(x, call.rows), g)
        if call.to_bias is not None:
            call.to_bias.note("bare", token_sum(g))
        grad_x = (grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def token_sum(g: Tensor) -> Tensor:
    """(B, T, d) summed over T, in float32 or better."""
    return g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
