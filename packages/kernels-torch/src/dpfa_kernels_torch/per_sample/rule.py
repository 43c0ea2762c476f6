"""What each kind of parameter offers, and what the kinds share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfa_core.checks import require

WORKING_SET = 1 << 20
"""Numbers of working memory that one block of samples may take."""


@dataclass(frozen=True)
class Rule:
    """`sqnorm(saved, method)` is float64 [B], `clipped_grad(saved, factors)` the weighted sum.

    `gradient(saved)` is the output gradient, whose first dimension numbers the samples; `methods` are the
    values of `method` that exist besides "auto"; `per_sample(saved)` forms each sample's gradient;
    `add_clipped_grad_(total, saved, factors)` is there where adding in place is cheaper than a sum of its own.
    """

    sqnorm: Callable[[tuple[Any, ...], str], Tensor]
    clipped_grad: Callable[[tuple[Any, ...], Tensor], Tensor]
    gradient: Callable[[tuple[Any, ...]], Tensor]
    methods: tuple[str, ...] = ("direct",)
    per_sample: Callable[[tuple[Any, ...]], Tensor] | None = None
    add_clipped_grad_: Callable[[Tensor, tuple[Any, ...], Tensor], Tensor] | None = None


def sample_blocks(batch: int, numbers_per_sample: int) -> Iterator[slice]:
    """Slices of the batch whose working memory stays within ``WORKING_SET``, at least one sample each."""
    step = max(1, WORKING_SET // max(1, numbers_per_sample))
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def require_shape(name: str, x: Tensor, dimensions: int, remedy: str) -> None:
    require(x.dim() == dimensions, f"{name} must have {dimensions} dimensions", tuple(x.shape), remedy)


def float32_above(x: Tensor) -> Tensor:
    """The least float32 >= x; infinity for what is not a number, which no clip factor lets through."""
    rounded = x.to(torch.float32)
    rounded = torch.where(rounded < x, torch.nextafter(rounded, rounded.new_tensor(torch.inf)), rounded)
    return torch.where(torch.isnan(rounded), torch.inf, rounded)
