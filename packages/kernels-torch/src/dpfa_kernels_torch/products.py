"""Rows times a public matrix, with products that no global setting can weaken."""

from __future__ import annotations

from torch import Tensor

from dpfa_kernels_torch.precision import working_dtype


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix with float32 products or better, rounded to x's dtype.

    Equal rows give equal bits in whatever order they lie in memory.
    """
    dtype = working_dtype(x)
    return (x.to(dtype).contiguous() @ matrix.to(dtype).contiguous()).to(x.dtype)
