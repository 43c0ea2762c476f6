"""Embedding tables: sample i's gradient of a row is the sum of the output gradients at its uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dpfa_training.tape import Tape


class EmbeddingRule:
    """``nn.Embedding`` on ids (B, ...); ids (1, ...) that the batch shares are repeated for each sample."""

    def refusal(self, module: nn.Embedding) -> str:
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return (
                "max_norm, scale_grad_by_freq and sparse couple the samples or the optimiser; "
                "build the Embedding without them"
            )
        return ""

    def forward(self, module: nn.Embedding, names: dict[str, str], tape: Tape, anchor: torch.Tensor) -> Any:
        def run(ids: torch.Tensor) -> torch.Tensor:
            if ids.shape[0] == 1 and tape.rows > 1:
                ids = ids.expand(tape.rows, *ids.shape[1:])
            return _Lookup.apply(  # type: ignore[no-any-return]
                ids, module.weight.detach(), anchor, tape, names["weight"], module.padding_idx
            )

        return run


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        weight: torch.Tensor,
        anchor: torch.Tensor,
        tape: Tape,
        name: str,
        padding_idx: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.tape, ctx.name, ctx.rows, ctx.padding_idx = tape, name, weight.shape[0], padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        samples = ids.shape[0]
        ctx.tape.add(
            ctx.name,
            "embedding",
            ids.reshape(samples, -1),
            grad.detach().reshape(samples, -1, grad.shape[-1]),
            ctx.rows,
            ctx.padding_idx,
        )
        return None, None, None, None, None, None
