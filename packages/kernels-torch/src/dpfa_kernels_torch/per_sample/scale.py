"""The scale of a normalisation: saved = (normalised input, output gradient), both [B, T, d]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_kernels_torch.per_sample.rule import require_shape
from dpfa_kernels_torch.per_sample.token_sum import token_sum


def terms(saved: tuple[Any, ...], some: slice, dtype: torch.dtype) -> Tensor:
    normalised, g = saved
    require_shape("the output gradient", g, 3, "Give (samples, positions, features).")
    require(
        normalised.shape == g.shape,
        f"the normalised input must have the output gradient's shape {tuple(g.shape)}",
        tuple(normalised.shape),
    )
    return normalised[some].to(dtype) * g[some].to(dtype)


RULE = token_sum(terms)
