"""The input projections of a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of `x`: half-precision inputs need no half-precision module."""
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def projected(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, S, H, D] of query, key and value [B, S, width]."""
    q, k, v = (
        linear(x, weight, bias).unflatten(-1, (heads, -1))
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    return q, k, v
