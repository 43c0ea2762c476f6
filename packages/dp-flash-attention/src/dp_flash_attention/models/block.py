"""One transformer block, shared by the image and the text model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm self-attention, then a two-layer perceptron, each added to its input.

    Guarantee: tested. Rows of a batch do not meet.

    Args:
        hidden: width of a token.
        heads: attention heads; divides `hidden`.
        expansion: width of the perceptron's middle over `hidden`.
    """

    def __init__(self, hidden: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.perceptron_norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, expansion * hidden)
        self.contract = nn.Linear(expansion * hidden, hidden)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens (B, T, hidden) to the same shape; `visible` is a bool mask that broadcasts to (B, heads, T, T)."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        return x + self.contract(F.gelu(self.expand(self.perceptron_norm(x))))  # type: ignore[no-any-return]
