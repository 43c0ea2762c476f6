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
    if norm == "l1":
        return x.abs().sum(-1, keepdim=True) * _margin(x)
    # Squares below the least normal number may vanish: one such number for each stands in for them.
    squares = (x * x).sum(-1, keepdim=True) + x.shape[-1] * torch.finfo(x.dtype).tiny
    return torch.sqrt(squares * _margin(x))


def zero_unless_finite(x: Tensor) -> Tensor:
    """Rows that hold a NaN or an infinity become zeros; the others stay."""
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, 0.0)


def clip_rows(x: Tensor, clip_norm: float, norm: Norm, whiten: Tensor | None = None) -> Tensor:
    """Each row times min(1, clip_norm / norm); the result's norm is at most `clip_norm`.

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
    bounded, bound, _ = _measured(x, norm, whiten)
    return torch.where(bounded, x, 0.0) * torch.clamp(clip_norm / bound, max=1.0)


def clip_rows_backward(dout: Tensor, x: Tensor, clip_norm: float, norm: Norm, whiten: Tensor | None = None) -> Tensor:
    """The gradient of ``clip_rows`` for x: clipped rows lose what would lengthen them, zeroed rows lose all.

    Guarantee: tested (finite differences; equal to what the tape gives).
    """
    x = zero_unless_finite(x)
    bounded, bound, direction = _measured(x, norm, whiten)
    factor = torch.clamp(clip_norm / bound, max=1.0)
    along = torch.where(factor < 1.0, (dout * x).sum(-1, keepdim=True) * factor / bound, 0.0)
    return torch.where(bounded, factor * dout - along * direction, 0.0)


def _measured(x: Tensor, norm: Norm, whiten: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(which rows have a norm, its upper bound or 1 where not, the bound's gradient) of finite rows."""
    y, whole = x, torch.ones_like(x[..., :1], dtype=torch.bool)
    if norm == "whitened_l2":
        if whiten is None:
            raise PrivacyParameterError("a clip in whitened_l2 needs the matrix that whitens, got None; pass whiten.")
        y = product(x, whiten)
        whole = torch.isfinite(y).all(-1, keepdim=True)
        y = torch.where(whole, y, 0.0)
    bound = norm_upper_bound(y, "l1" if norm == "l1" else "l2")
    bounded = whole & torch.isfinite(bound)
    bound = torch.where(bounded, bound, 1.0)
    direction = torch.sign(y) if norm == "l1" else torch.where(bounded, y, 0.0) / bound
    # the bound is the norm with a margin, which its gradient has, too
    direction = direction * _margin(x)
    return bounded, bound, product(direction, whiten.T) if whiten is not None and norm == "whitened_l2" else direction


def _margin(x: Tensor) -> float:
    return 1.0 + (x.shape[-1] + 16) * torch.finfo(x.dtype).eps / 2.0
