"""A table used as an embedding and as a linear layer: one gradient, cross terms included.

saved = (ids [B, S], gradient of the looked-up rows [B, S, d], rows, padding_idx or None,
hidden [B, T, d], gradient of the logits [B, T, rows]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_kernels_torch.per_sample import embedding, linear
from dpfa_kernels_torch.per_sample.rounding import UNIT
from dpfa_kernels_torch.per_sample.rule import Rule, sample_blocks


def sqnorm(saved: tuple[Any, ...], method: str) -> Tensor:
    """||in||^2 + ||out||^2 + 2 <in, out>; <in, out> = sum_{s,t} R[t, x_s] <G_s, H_t> needs no table."""
    first, second = _parts(saved)
    result = embedding.sqnorm(first, "auto") + linear.sqnorm(second, "auto")
    ids, g, _, padding = first
    hidden, logits = second
    S, T = ids.shape[1], hidden.shape[1]
    for some in sample_blocks(len(ids), 3 * S * T + (S + T) * g.shape[2]):
        terms, states = g[some].double(), hidden[some].double()
        if padding is not None:
            terms = torch.where((ids[some] == padding).unsqueeze(-1), 0.0, terms)
        index = ids[some].long().unsqueeze(1).expand(-1, T, -1)
        found = logits[some].gather(2, index).double()  # [b, T, S]
        cross = (found * torch.bmm(states, terms.mT)).sum((1, 2))
        lengths = [torch.linalg.vector_norm(x, dim=2) for x in (states, terms)]
        most = found.abs() * lengths[0].unsqueeze(2) * lengths[1].unsqueeze(1)
        slack = (S * T + g.shape[2]) * UNIT * most.sum((1, 2))
        result[some] += 2 * cross + 4 * slack + 8 * UNIT * result[some]
    return result.clamp(min=0)


def clipped_grad(saved: tuple[Any, ...], factors: Tensor) -> Tensor:
    """sum_i factors[i] * (gradient of sample i): [rows, d]."""
    first, second = _parts(saved)
    return embedding.add_clipped_grad_(linear.clipped_grad(second, factors), first, factors)


def per_sample(saved: tuple[Any, ...]) -> Tensor:
    """The gradient of every sample: [B, rows, d]."""
    first, second = _parts(saved)
    ids, g, rows, padding = first
    whole = linear.per_sample(second)
    terms = g.to(whole.dtype)
    if padding is not None:
        terms = torch.where((ids == padding).unsqueeze(-1), 0.0, terms)
    index = ids.long() + rows * torch.arange(len(ids), device=ids.device).unsqueeze(-1)
    whole.view(-1, g.shape[2]).index_add_(0, index.flatten(), terms.flatten(0, 1))
    return whole


def _parts(saved: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    ids, g, rows, _, hidden, logits = saved
    require(
        logits.shape[2] == rows and hidden.shape[2] == g.shape[2] and len(hidden) == len(ids),
        f"both uses of a tied table must see {len(ids)} samples, {rows} rows and {g.shape[2]} features",
        f"{tuple(hidden.shape)} and {tuple(logits.shape)}",
    )
    return saved[:4], (hidden, logits)


RULE = Rule(sqnorm, clipped_grad, gradient=lambda saved: saved[1], per_sample=per_sample)
