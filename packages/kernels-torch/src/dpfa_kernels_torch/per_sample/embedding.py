"""An embedding table: the gradient rows of one sample are sums over equal tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_kernels_torch.per_sample.rounding import summed_bound
from dpfa_kernels_torch.per_sample.rule import Rule, require_shape, sample_blocks


def sqnorm(saved: tuple[Any, ...], method: str) -> Tensor:
    """Segment sums by (sample, token), then squares: O(T * d), no one-hot."""
    ids, g, rows, padding = checked(saved)
    B, T, d = g.shape
    result = torch.empty(B, dtype=torch.float64, device=g.device)
    for some in sample_blocks(B, 2 * T * d):
        counted, terms = _counted(ids[some], padding), g[some].double()
        terms = torch.where(counted.unsqueeze(-1), terms, 0.0)
        sample = torch.arange(len(terms), device=ids.device).unsqueeze(-1)
        segments, index = torch.unique(sample * rows + ids[some], return_inverse=True)
        sums = terms.new_zeros(len(segments), d).index_add_(0, index.flatten(), terms.reshape(-1, d))
        squares = terms.new_zeros(len(terms)).index_add_(0, segments // rows, sums.square().sum(1))
        spread = torch.linalg.vector_norm(terms, dim=2).sum(1)
        result[some] = summed_bound(squares.sqrt(), T, spread)
    return result


def clipped_grad(saved: tuple[Any, ...], factors: Tensor) -> Tensor:
    """sum_i factors[i] * (gradient of sample i): [rows, d]."""
    _, g, rows, _ = saved
    grad = torch.zeros(rows, g.shape[2], dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
    return add_clipped_grad_(grad, saved, factors)


def add_clipped_grad_(total: Tensor, saved: tuple[Any, ...], factors: Tensor) -> Tensor:
    """The same, added to `total`: touches the rows of the batch's tokens only."""
    ids, g, _, padding = checked(saved)
    weights = torch.where(_counted(ids, padding), factors.to(total.dtype).unsqueeze(-1), 0.0)
    terms = g.to(total.dtype) * weights.unsqueeze(-1)
    return total.index_add_(0, ids.flatten(), terms.reshape(-1, g.shape[2]))


def _counted(ids: Tensor, padding: int | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding


def checked(saved: tuple[Any, ...]) -> tuple[Tensor, Tensor, int, int | None]:
    ids, g, rows, padding = saved
    require_shape("token ids", ids, 2, "Give (samples, positions).")
    require_shape("the output gradient", g, 3, "Give (samples, positions, features).")
    require(
        ids.shape == g.shape[:2],
        f"ids and output gradient must agree in samples and positions, {tuple(ids.shape)}",
        tuple(g.shape[:2]),
    )
    if ids.numel():
        least, most = int(ids.min()), int(ids.max())
        require(
            least >= 0 and most < rows,
            f"token ids must be in [0, {rows})",
            least if least < 0 else most,
        )
    return ids.long(), g, rows, padding


RULE = Rule(sqnorm, clipped_grad, gradient=lambda saved: saved[1], add_clipped_grad_=add_clipped_grad_)
