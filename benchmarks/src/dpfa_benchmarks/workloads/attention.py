"""One attention block and little else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpfa_benchmarks.workloads.blocks import SelfAttention
from dpfa_benchmarks.workloads.workload import Model, Workload, fresh

CLASSES = 10


class AttentionBlock(nn.Module):
    """Pre-norm attention with a residual, mean over the sequence, head."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x + self.attention(self.norm(x))).mean(1))
        return logits


def _build(batch: int, toy: bool) -> Workload:
    width, heads, length = (16, 2, 10) if toy else (512, 8, 512)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, length, width, generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    return Workload(fresh(lambda: AttentionBlock(width=width, heads=heads)), inputs, labels)


ATTENTION = Model(batch=8, build=_build)
