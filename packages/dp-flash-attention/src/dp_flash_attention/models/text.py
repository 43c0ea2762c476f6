"""A small text transformer that starts as a sum of word vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dp_flash_attention.models.block import Block


class TextTransformer(nn.Module):
    """Hashed words, learned positions, transformer blocks, pooling over the real words, linear head.

    Blocks start as the identity and the head as a fixed random direction for each class, so that the first gradients
    fall on the word vectors and training begins as a bag of words, which noise harms least; the blocks join in from
    there.

    Guarantee: tested. A row of the output depends on the same row of the input only, and not on its padding.

    Args:
        classes: number of logits, at most `hidden`.
        buckets: word numbers 1 .. buckets; 0 is padding.
        length: tokens in a row.
        hidden: width of a token; a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of a block.
    """

    def __init__(
        self, *, classes: int, buckets: int = 8192, length: int = 96, hidden: int = 48, layers: int = 1, heads: int = 4
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(buckets + 1, hidden, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(1, length, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads, expansion=2) for _ in range(layers))
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():
            self.words.weight.normal_(std=0.01)
            self.words.weight[0] = 0
            for block in self.blocks:
                for last in (block.attention_out, block.contract):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)
            # The wide head turns a small step of a word vector into a step of the logits.
            nn.init.orthogonal_(self.head.weight, gain=5.0)
            nn.init.zeros_(self.head.bias)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (B, classes) of word numbers (B, length), int64, 0 where there is no word."""
        # Padding that all rows share changes no row and would only cost time.
        words = words[:, : max(1, int((words != 0).sum(dim=1).max())) if len(words) else 1]
        real = words != 0
        visible = real.clone()
        visible[:, 0] = True  # a row without words attends to its first padding instead of to nothing
        x = self.words(words) + self.positions[:, : words.shape[1]]
        for block in self.blocks:
            x = block(x, visible[:, None, None, :])
        total = (x * real[..., None]).sum(dim=1)
        return self.head(total / real.sum(dim=1, keepdim=True).clamp_min(1).sqrt())  # type: ignore[no-any-return]
