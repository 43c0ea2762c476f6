"""The per-sample gradient that a note stands for, written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def materialise(kind: str, saved: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """(B, *shape) in float32 or better.

    Args: kind, saved: as for ``Backend.sqnorm``: "bare", "linear" or "embedding".
    """
    gradient = saved[1] if kind in ("linear", "embedding") else saved[0]
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    rows = gradient.shape[0]
    if kind == "bare":
        return gradient.to(dtype).reshape(rows, *shape)  # type: ignore[no-any-return]
    if kind == "linear":
        a, g = saved
        with torch.autocast(g.device.type, enabled=False):  # the loop may call backward under autocast
            return torch.bmm(g.to(dtype).mT, a.to(dtype)).reshape(rows, *shape)
    if kind == "embedding":
        ids, g, table, padding = saved
        terms = g.to(dtype)
        if padding is not None:
            terms = terms.masked_fill((ids == padding).unsqueeze(-1), 0.0)
        index = ids + torch.arange(rows, device=ids.device).unsqueeze(-1) * table
        whole = terms.new_zeros(rows * table, g.shape[-1])
        return whole.index_add_(0, index.flatten(), terms.flatten(0, 1)).reshape(rows, *shape)  # type: ignore[no-any-return]
    raise ValueError(f"a note must be bare, linear or embedding, got {kind!r}")
