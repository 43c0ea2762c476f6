"""Rows scaled down to a norm bound."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import Norm
from dpfa_kernels_torch.products import product


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


def clip_rows(x: Tensor, clip_norm: float, norm: Norm, whiten: Tensor | None = None) -> Tensor:
    """Each row times min(1, clip_norm / norm), differentiable; the result's norm is at most `clip_norm`.

    | row | becomes |
    |---|---|
    | holds a NaN or an infinity | zeros |
    | its squared norm overflows | zeros |
    | zeros | zeros |

    Guarantee: tested (exhaustive over float16 values, random rows, gradients). In "whitened_l2" the norm holds up
    to the rounding of ``x @ whiten``, which the mechanism's sensitivity has a margin for.
    Args:
        x: float32 or float64 [..., D].
        clip_norm: in the units of x, > 0.
        whiten: [D, D], for "whitened_l2" alone: the rows of ``x @ whiten`` are measured.
    Returns: like x.
    Source: PRIVACY P2, P5, P10.
    """
    x = zero_unless_finite(x)
    if norm == "whitened_l2":
        if whiten is None:
            raise PrivacyParameterError("a clip in whitened_l2 needs the matrix that whitens, got None; pass whiten.")
        measured = product(x, whiten)
        # a sum that overflows must not reach the square, whose derivative would be 0 * inf
        whole = torch.isfinite(measured).all(-1, keepdim=True)
        bound = norm_upper_bound(torch.where(whole, measured, 0.0), "l2")
        bounded = whole & torch.isfinite(bound)
    else:
        bound = norm_upper_bound(x, norm)
        bounded = torch.isfinite(bound)
    factor = torch.clamp(clip_norm / torch.where(bounded, bound, 1.0), max=1.0)
    return torch.where(bounded, x, 0.0) * factor
