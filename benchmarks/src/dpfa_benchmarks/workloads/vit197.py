"""A ViT of the usual sequence length: 196 patches, cut beforehand, and a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpfa_benchmarks.workloads.blocks import blocks
from dpfa_benchmarks.workloads.workload import Model, Workload, fresh

CLASSES = 10


class PatchTransformer(nn.Module):
    """Linear on patches, class token, positions, blocks, head on the class token."""

    def __init__(self, *, layers: int, width: int, heads: int, patches: int, inputs: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.patch = nn.Linear(inputs, width)
        self.blocks = blocks(layers, width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(patches), -1, -1), self.patch(patches)], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def _build(batch: int, toy: bool) -> Workload:
    sizes = {"layers": 6, "width": 192, "heads": 3, "patches": 196, "inputs": 768}
    if toy:
        sizes = {"layers": 2, "width": 16, "heads": 2, "patches": 8, "inputs": 12}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, sizes["patches"], sizes["inputs"], generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    return Workload(fresh(lambda: PatchTransformer(**sizes)), images, labels)


VIT197 = Model(batch=64, build=_build)
