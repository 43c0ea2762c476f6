"""A parameter that every sample uses once, as it is: saved = (its gradient in each sample [B, *shape],)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_kernels_torch.per_sample.token_sum import token_sum


def terms(saved: tuple[Any, ...], some: slice, dtype: torch.dtype) -> Tensor:
    (g,) = saved
    return g[some].to(dtype).unsqueeze(1)


RULE = token_sum(terms)
