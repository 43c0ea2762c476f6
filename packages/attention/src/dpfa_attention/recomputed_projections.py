"""A release that keeps no queries, keys and values: its backward projects them again, some batch rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpfa_attention import release_op
from dpfa_attention.projection import projected
from dpfa_attention.terms import Terms


class RecomputedProjections(torch.autograd.Function):
    """A release, put on the tape behind the module's inputs instead of behind its projections.

    What is kept are the inputs and the terms. The noise is not made again: it is in the output, and has no gradient.

    Guarantee: tested (the gradients of the whole, at any number of segments).
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, terms: Terms, bias: Tensor | None, segments: int, *tensors: Tensor | None
    ) -> Tensor:
        """Args: `out` [B, S, H, D], released of what three inputs [B, S, width], weights and biases, the `tensors`,
        project to, with a public `bias` of the logits.
        """
        ctx.save_for_backward(bias, *tensors)
        ctx.terms, ctx.segments, ctx.heads, ctx.dtype = terms, segments, out.shape[2], out.dtype
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        bias, *tensors = ctx.saved_tensors
        inputs, weights, biases = (tensors[first : first + 3] for first in (0, 3, 6))
        needed = [
            torch.zeros_like(x, dtype=x.dtype if place < 3 else _wide(x.dtype)) if wanted else None
            for place, (x, wanted) in enumerate(zip(tensors, ctx.needs_input_grad[4:], strict=True))
        ]
        for rows, values in _segments(ctx.terms, bias, dout.shape[0], ctx.segments):
            parts = [x[rows].to(ctx.dtype) for x in inputs]
            with torch.autocast(dout.device.type, enabled=False):
                q, k, v = projected(parts, weights, biases, ctx.heads)
                grads = release_op.release_backward(dout[rows].contiguous(), q, k, v, *values)
                for place, (x, weight, grad) in enumerate(zip(parts, weights, grads, strict=True)):
                    flat = grad.flatten(2)
                    _add(needed[place], rows, lambda flat=flat, weight=weight: flat @ weight.to(flat.dtype))
                    flat, x = flat.flatten(0, 1), x.flatten(0, 1)
                    _add(needed[3 + place], slice(None), lambda flat=flat, x=x: flat.T @ x)
                    _add(needed[6 + place], slice(None), lambda flat=flat: flat.sum(0))
        found = (None if grad is None else grad.to(x.dtype) for grad, x in zip(needed, tensors, strict=True))
        return (None,) * 4 + tuple(found)


def _add(total: Tensor | None, where: slice, part: Any) -> None:
    if total is not None:
        total[where] += part()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of a sum over segments, which is rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _segments(terms: Terms, bias: Tensor | None, batch: int, segments: int) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Batch rows, as even as can be, and the terms and the bias of a release of them."""
    count = max(1, min(segments, batch))
    for part in range(count):
        rows = slice(part * batch // count, (part + 1) * batch // count)
        lengths: Sequence[int] = terms.lengths[2 * rows.start : 2 * rows.stop]
        part_of_bias = () if bias is None else (bias[rows] if len(bias) > 1 else bias,)
        yield rows, (*terms._replace(lengths=tuple(lengths)), *part_of_bias)
