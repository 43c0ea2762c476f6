"""A GPT whose head is a layer of its own, or the token table once more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfa_benchmarks.workloads.blocks import blocks
from dpfa_benchmarks.workloads.workload import Model, Workload, fresh


class Decoder(nn.Module):
    """Tokens and positions, causal blocks, logits for every next token."""

    def __init__(self, *, layers: int, width: int, heads: int, length: int, words: int, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, width)
        nn.init.normal_(self.tokens.weight, std=0.02)  # GPT-2's: a tied head would else begin with huge logits
        self.positions = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = blocks(layers, width, heads, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions))
        logits: Tensor = F.linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return logits


def _build(batch: int, toy: bool, *, tied: bool) -> Workload:
    sizes = {"layers": 4, "width": 384, "heads": 6, "length": 256, "words": 8192}
    if toy:
        sizes = {"layers": 2, "width": 16, "heads": 2, "length": 10, "words": 40}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, sizes["words"], (batch, sizes["length"] + 1), generator=generator)
    return Workload(fresh(lambda: Decoder(**sizes, tied=tied)), drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())


GPT = Model(batch=16, build=lambda batch, toy: _build(batch, toy, tied=False))
GPT_TIED = Model(batch=16, build=lambda batch, toy: _build(batch, toy, tied=True))
