"""Parameters whose gradient in one sample is a plain sum of terms over its positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpfa_kernels_torch.per_sample.rounding import summed_bound
from dpfa_kernels_torch.per_sample.rule import Rule, sample_blocks

Terms = Callable[[tuple[Any, ...], slice, torch.dtype], Tensor]
"""The terms of a block of samples, [b, T, *shape], in a dtype."""


def token_sum(terms: Terms) -> Rule:
    """The rule of a parameter with these terms."""

    def blocks(saved: tuple[Any, ...]) -> list[slice]:
        g = saved[-1]
        return list(sample_blocks(len(g), 2 * g[:1].numel())) or [slice(0, 0)]

    def sqnorm(saved: tuple[Any, ...], method: str) -> Tensor:
        results = []
        for some in blocks(saved):
            values = terms(saved, some, torch.float64).flatten(2)
            norm = torch.linalg.vector_norm(values.sum(1), dim=1)
            spread = torch.linalg.vector_norm(values, dim=2).sum(1)
            results.append(summed_bound(norm, values.shape[1], spread))
        return torch.cat(results)

    def clipped_grad(saved: tuple[Any, ...], factors: Tensor) -> Tensor:
        dtype = torch.promote_types(saved[-1].dtype, torch.float32)
        parts = [
            (factors[some].to(dtype)[:, None] * terms(saved, some, dtype).sum(1).flatten(1)).sum(0)
            for some in blocks(saved)
        ]
        shape = terms(saved, slice(0, 0), dtype).shape[2:]
        return torch.stack(parts).sum(0).reshape(shape)

    return Rule(sqnorm, clipped_grad, gradient=lambda saved: saved[-1])
