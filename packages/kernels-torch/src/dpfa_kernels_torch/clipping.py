"""Rows scaled down to a norm bound."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def norm_upper_bound(x: Tensor, norm: Literal["l1", "l2"]) -> Tensor:
    """An upper bound of each row's norm that covers its own rounding, the division by it and the scaling.

    Guarantee: tested (against exact norms; exhaustive over float16 values).
    Args: x: float32 or float64 [..., D].
    Returns: [..., 1], at most (D + 16) unit roundoffs above the norm, absolutely 2**-63 * sqrt(D) in float32.
    """
    limits = torch.finfo(x.dtype)
    width = x.shape[-1]
    unit = limits.eps / 2
    if norm == "l1":
        return x.abs().sum(-1, keepdim=True) * (1 + (width + 16) * unit)
    # Squares below the least normal number may vanish: one such number for each stands in for them. It also
    # keeps the derivative of the root finite at a row of zeros.
    squares = (x * x).sum(-1, keepdim=True) + width * limits.tiny
    return torch.sqrt(squares * (1 + (width + 16) * unit))


def zero_unless_finite(x: Tensor) -> Tensor:
    """Rows that hold a NaN or an infinity become zeros; the others stay."""
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, 0.0)


def clip_rows(x: Tensor, clip_norm: float, norm: Literal["l1", "l2"]) -> Tensor:
    """Each row times min(1, clip_norm / norm), differentiable; the result's norm is at most `clip_norm`.

    | row | becomes |
    |---|---|
    | holds a NaN or an infinity | zeros |
    | its squared norm overflows | zeros |
    | zeros | zeros |

    Guarantee: tested (exhaustive over float16 values, random rows, gradients).
    Args:
        x: float32 or float64 [..., D].
        clip_norm: in the units of x, > 0.
    Returns: like x.
    Source: PRIVACY P2, P10.
    """
    x = zero_unless_finite(x)
    bound = norm_upper_bound(x, norm)
    bounded = torch.isfinite(bound)
    factor = torch.clamp(clip_norm / torch.where(bounded, bound, 1.0), max=1.0)
    return torch.where(bounded, x, 0.0) * factor
