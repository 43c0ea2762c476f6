"""A bias, or the shift of a normalisation: saved = (output gradient [B, T, p],)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_kernels_torch.per_sample.rule import require_shape
from dpfa_kernels_torch.per_sample.token_sum import token_sum


def terms(saved: tuple[Any, ...], some: slice, dtype: torch.dtype) -> Tensor:
    (g,) = saved
    require_shape("the output gradient", g, 3, "Give (samples, positions, features).")
    return g[some].to(dtype)


RULE = token_sum(terms)
