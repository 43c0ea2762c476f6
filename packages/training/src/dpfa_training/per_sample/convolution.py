"""Convolutions: a linear map of the patches under the kernel, which torch computes as it does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.linear import Call, split, token_sum
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.use import Use, register
from dpfa_training.per_sample.uses import autocast_dtype


@register(F.conv2d)
def conv2d(
    use: Use,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` on (B, C, H, W)."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim != 0 or input.dim() != 4:
        raise use.unknown("the samples must be in dimension 0")
    if isinstance(padding, str):
        raise use.unknown("only padding given as numbers")
    call, values = split(weight, bias, samples, use.rows)
    where = tuple(_pair(item) for item in (stride, padding, dilation))
    return _Convolve.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, *values, use.uses.anchor, where, groups, call
    )


@register(F.conv1d)
def conv1d(
    use: Use,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv1d`` on (B, C, L) as a convolution of height 1."""
    samples = None if isinstance(input, Proxy) else use.samples(input)
    if samples is None or samples.dim != 0 or input.dim() != 3 or isinstance(padding, str):
        raise use.unknown("the samples must be in dimension 0 and padding a number")
    (stride,), (padding,), (dilation,) = (_single(item) for item in (stride, padding, dilation))
    flat = input.unsqueeze(2)
    inner = Use(use.function, use.proxies, [flat, *use.plain], (samples, *use.layouts), use.rows)
    out = conv2d(inner, flat, weight.unsqueeze(2), bias, (1, stride), (0, padding), (1, dilation), groups)
    return out.squeeze(2)  # type: ignore[no-any-return]


def _pair(item: Any) -> tuple[int, int]:
    return (item, item) if isinstance(item, int) else tuple(item) * (2 // len(item))


def _single(item: Any) -> tuple[int]:
    return (item,) if isinstance(item, int) else tuple(item)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        where: tuple[tuple[int, int], ...],
        groups: int,
        call: Call,
    ) -> Tensor:
        ctx.dtype = x.dtype
        dtype = autocast_dtype(x)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.where, ctx.groups, ctx.call = where, groups, call
        stride, padding, dilation = where
        if call.to_weight is not None and groups == 1:
            call.to_weight.expect(product=True)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        call = ctx.call
        g = call.samples.tokens(grad.flatten(2).mT, call.rows)
        if call.to_weight is not None:
            patches = call.samples.tokens(_patches(x, weight, ctx.where), call.rows)
            if ctx.groups == 1:
                call.to_weight.note("linear", patches, g)
            else:
                call.to_weight.note("bare", _grouped(patches, g, ctx.groups).reshape(call.rows, *weight.shape))
        if call.to_bias is not None:
            call.to_bias.note("bare", token_sum(g))
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation = ctx.where
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], ctx.groups, [True, False, False]
            )[0].to(ctx.dtype)
        return grad_x, None, None, None, None, None, None


def _grouped(patches: Tensor, g: Tensor, groups: int) -> Tensor:
    """(B, groups, outputs of a group, inputs of a group): small, as a group sees few channels."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    with torch.autocast(g.device.type, enabled=False):
        a, g = (item.to(dtype).unflatten(2, (groups, -1)).movedim(2, 1) for item in (patches, g))  # type: ignore[no-untyped-call]
        return g.mT @ a  # type: ignore[no-any-return]


def _patches(x: Tensor, weight: Tensor, where: tuple[tuple[int, int], ...]) -> Tensor:
    """(B, places, numbers under the kernel)."""
    stride, padding, dilation = where
    height, width = weight.shape[2:]
    if stride == (height, width) and padding == (0, 0) and dilation == (1, 1):  # patches that do not overlap
        rows, columns = x.shape[-2] // height, x.shape[-1] // width
        cut = x[..., : rows * height, : columns * width].reshape(len(x), -1, rows, height, columns, width)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.unfold(x, (height, width), dilation, padding, stride).mT
