"""The weight of a linear layer: gradient g^T a of one sample, never held for a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_kernels_torch.per_sample.rounding import UNIT, summed_bound
from dpfa_kernels_torch.per_sample.rule import WORKING_SET, Rule, require_shape, sample_blocks
from dpfa_kernels_torch.precision import working_dtype

TILE = 128
"""Rows of the Gram matrices held at a time."""

LOOSE = 1e-6
"""The Gram form gives way where its slack exceeds this fraction of its value."""


def sqnorm(saved: tuple[Any, ...], method: str) -> Tensor:
    """||g_i^T a_i||^2 from above, by the gradient's tiles (direct) or <a a^T, g g^T> (gram)."""
    a, g = _checked(saved)
    B, T, d = a.shape
    p = g.shape[2]
    if method == "auto":
        method = "gram" if gram_is_cheaper(T, d, p) else "direct"
    form = _gram if method == "gram" else _direct
    held = T * (d + p) + (min(T, TILE) * T * 2 if method == "gram" else min(d * p, WORKING_SET))
    result = torch.empty(B, dtype=torch.float64, device=a.device)
    for some in sample_blocks(B, held):
        result[some] = form(a[some].double(), g[some].double())
    return result


def clipped_grad(saved: tuple[Any, ...], factors: Tensor) -> Tensor:
    """sum_i factors[i] * g_i^T a_i: [p, d]."""
    a, g = _checked(saved)
    B, T, d = a.shape
    p = g.shape[2]
    dtype = working_dtype(g)
    grad = torch.zeros(p, d, dtype=dtype, device=g.device)
    for some in sample_blocks(B, T * (d + p)):
        # The factor multiplies in the working dtype: folded into a bfloat16 g it would miss by 2**-8.
        weighted = g[some].to(dtype) * factors[some].to(dtype)[:, None, None]
        grad.addmm_(weighted.reshape(-1, p).T, a[some].to(dtype).reshape(-1, d))
    return grad


def per_sample(saved: tuple[Any, ...]) -> Tensor:
    """g_i^T a_i of every sample: [B, p, d]."""
    a, g = _checked(saved)
    dtype = working_dtype(g)
    return torch.bmm(g.to(dtype).mT, a.to(dtype)).to(torch.promote_types(g.dtype, torch.float32))


def gram_is_cheaper(T: int, d: int, p: int) -> bool:
    """By multiplications: T * (T + tile) / 2 * (d + p) of the Gram form against T * d * p."""
    return (T + min(T, TILE)) * (d + p) < 2 * d * p


def _direct(a: Tensor, g: Tensor) -> Tensor:
    # The norm does not mind a transposed gradient; the product is faster with the wide factor on the right.
    narrow, wide = (a, g) if a.shape[2] <= g.shape[2] else (g, a)
    tile = max(1, WORKING_SET // wide.shape[2])
    parts = [torch.linalg.matrix_norm(torch.bmm(some.mT, wide)) for some in narrow.split(tile, dim=2)]
    norm = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return summed_bound(norm, a.shape[1], _spread(a, g))


def _gram(a: Tensor, g: Tensor) -> Tensor:
    T, d = a.shape[1:]
    total = a.new_zeros(len(a))
    for start in range(0, T, TILE):
        row = slice(start, start + TILE)
        product = torch.bmm(a[:, row], a[:, start:].mT) * torch.bmm(g[:, row], g[:, start:].mT)
        # The tiles right of the diagonal stand for those below it, too.
        total += product[:, :, :TILE].sum((1, 2)) + 2 * product[:, :, TILE:].sum((1, 2))
    slack = 2 * (d + g.shape[2] + T * T) * UNIT * _spread(a, g).square()
    loose = slack > LOOSE * total
    result = total.clamp(min=0) + slack
    # One at a time: rare, and a block that fits the Gram form may not fit this one.
    for index in loose.nonzero().flatten().tolist():
        result[index] = _direct(a[index : index + 1], g[index : index + 1])[0]
    return result


def _spread(a: Tensor, g: Tensor) -> Tensor:
    """sum_t ||a_t|| ||g_t||: by Cauchy-Schwarz above every sum of absolute terms in either form."""
    return (torch.linalg.vector_norm(a, dim=2) * torch.linalg.vector_norm(g, dim=2)).sum(1)


def _checked(saved: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    a, g = saved
    for name, x in (("the layer's input", a), ("the output gradient", g)):
        require_shape(name, x, 3, "Give (samples, positions, features): join other dimensions to positions.")
    require(
        a.shape[:2] == g.shape[:2],
        f"input and output gradient must agree in samples and positions, {tuple(a.shape[:2])}",
        tuple(g.shape[:2]),
    )
    return a, g


RULE = Rule(sqnorm, clipped_grad, gradient=lambda saved: saved[1], methods=("direct", "gram"), per_sample=per_sample)
