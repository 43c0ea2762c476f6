"""A text encoder that says which of two classes a sequence belongs to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpfa_benchmarks.workloads.blocks import blocks
from dpfa_benchmarks.workloads.workload import Model, Workload, fresh, words_by_class


class Encoder(nn.Module):
    """Tokens and positions, blocks, mean over the sequence, head."""

    def __init__(self, *, layers: int, width: int, heads: int, length: int, words: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = blocks(layers, width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions))
        logits: Tensor = self.head(x.mean(1))
        return logits


def _build(batch: int, toy: bool) -> Workload:
    sizes = {"layers": 4, "width": 256, "heads": 4, "length": 128, "words": 8192}
    if toy:
        sizes = {"layers": 2, "width": 16, "heads": 2, "length": 10, "words": 40}
    tokens, labels = words_by_class(batch, sizes["length"], sizes["words"])
    return Workload(fresh(lambda: Encoder(**sizes)), tokens, labels)


ENCODER = Model(batch=32, build=_build)
