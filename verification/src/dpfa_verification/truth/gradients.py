"""Per-sample weight gradients, one sample at a time in float64: [B, *parameter shape]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def per_sample(kind: str, saved: tuple[Any, ...]) -> Tensor:
    """The gradient of each sample for a parameter of this kind; `saved` is what a backend is given."""
    return torch.stack([_one(kind, saved, sample) for sample in range(len(saved[0]))])


def _one(kind: str, saved: tuple[Any, ...], sample: int) -> Tensor:
    match kind:
        case "linear":
            a, g = (x[sample].double() for x in saved)
            return sum((torch.outer(g[t], a[t]) for t in range(len(a))), torch.zeros(g.shape[1], a.shape[1]).double())
        case "embedding":
            ids, g, rows, padding = saved
            table = torch.zeros(rows, g.shape[2], dtype=torch.float64)
            for position, token in enumerate(ids[sample].tolist()):
                if token != padding:
                    table[token] += g[sample, position].double()
            return table
        case "scale":
            normalised, g = (x[sample].double() for x in saved)
            return (normalised * g).sum(0)
        case "shift":
            return saved[0][sample].double().sum(0)
        case "bare":
            return saved[0][sample].double()
    raise KeyError(kind)
