"""Embedding tables: sample i's gradient of a row is the sum of the output gradients at its uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample.derived import Source
from dpfa_training.per_sample.materialise import materialise
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.samples import Samples
from dpfa_training.per_sample.use import CONSTANT, Use, register


@register(F.embedding, torch.embedding)
def embedding(
    use: Use,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding``; ids that all samples share (positions) give a proxy, looked up for each sample later."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotPrivateError(
            f"{weight.label!r} must be an embedding without max_norm, scale_grad_by_freq and sparse, which couple "
            "the samples or the optimiser; build it without them."
        )
    if not isinstance(weight, Proxy) or isinstance(input, Proxy):
        raise use.unknown()
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.value.shape[0]
    samples = use.samples(input)
    if samples is None:
        found = F.embedding(input, weight.value)
        proxy = _Lookup.over(found, f"{weight.label}.embedding", weight.parameters, weight.uses)
        proxy.source, proxy.ids, proxy.padding, proxy.original = weight, input, padding_idx, found
        return proxy  # type: ignore[no-any-return]
    return _Rows.apply(  # type: ignore[no-any-return, no-untyped-call]
        input, weight.value, use.uses.anchor, samples, use.rows, weight, padding_idx
    )


CONSTANT[F.embedding] = embedding


@register(torch.Tensor.__getitem__)
def rows_of(use: Use, source: Any, index: Any) -> Tensor:
    """``table[ids]``."""
    whole = isinstance(source, Proxy) and isinstance(index, Tensor) and not index.dtype.is_floating_point
    if not whole or source.dim() != 2 or index.dtype is torch.bool:
        raise use.unknown()
    return embedding(use, index, source)  # type: ignore[no-any-return]


class _Lookup(Source):
    """Rows of a table at ids that all samples share."""

    source: Any
    ids: Tensor
    padding: int | None

    def note(self, kind: str, *saved: Any) -> None:
        gradient = materialise(kind, saved, self.value.shape)
        rows = gradient.shape[0]
        ids = self.ids.reshape(1, -1).expand(rows, -1)
        gradient = gradient.reshape(rows, ids.shape[1], -1)
        self.source.note("embedding", ids, gradient, self.source.value.shape[0], self.padding)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        anchor: Tensor,
        samples: Samples,
        rows: int,
        target: Any,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.samples, ctx.rows, ctx.target, ctx.padding_idx = samples, rows, target, padding_idx
        target.expect(product=False)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        rows = ctx.rows
        ids = ctx.samples.first(ids, rows).reshape(rows, -1)
        g = ctx.samples.first(grad, rows).reshape(rows, ids.shape[1], grad.shape[-1])
        ctx.target.note("embedding", ids, g, ctx.target.value.shape[0], ctx.padding_idx)
        return None, None, None, None, None, None, None
