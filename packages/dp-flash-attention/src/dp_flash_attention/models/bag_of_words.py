"""The linear baseline for texts."""

from __future__ import annotations

from torch import Tensor, nn


class BagOfWords(nn.Module):
    """Logistic regression on word counts, scaled to length 1.

    Guarantee: tested. A row of the output depends on the same row of the input only, and not on the words' order.

    Args:
        classes: number of logits.
        buckets: word numbers 1 .. buckets; 0 is padding.
    """

    def __init__(self, *, classes: int, buckets: int = 8192) -> None:
        super().__init__()
        self.buckets = buckets
        self.head = nn.Linear(buckets, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (B, classes) of word numbers (B, length), int64."""
        ones = self.head.weight.new_ones(words.shape)
        counts = ones.new_zeros(len(words), self.buckets + 1).scatter_add_(1, words, ones)[:, 1:]
        return self.head(counts / counts.norm(dim=1, keepdim=True).clamp_min(1))  # type: ignore[no-any-return]
