"""A small vision transformer of plain torch modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dp_flash_attention.models.block import Block


class VisionTransformer(nn.Module):
    """Patches, learned positions, transformer blocks, mean over patches, linear head.

    Guarantee: tested. A row of the output depends on the same row of the input only; there is no dropout.

    Args:
        classes: number of logits.
        side: height and width of the images, pixels; a multiple of `patch`.
        channels: 1 for gray, 3 for RGB.
        patch: side of a patch, pixels.
        hidden: width of a token; a multiple of `heads`.
        layers: number of blocks.
        heads: attention heads of a block.
    """

    def __init__(
        self,
        *,
        classes: int,
        side: int = 8,
        channels: int = 1,
        patch: int = 2,
        hidden: int = 48,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads, expansion=4) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, side, side)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]
