"""Patch embeddings: a ``Conv2d`` whose stride is its kernel is a linear layer on the patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpfa_training.per_sample.linear import affine
from dpfa_training.tape import Tape


class PatchRule:
    """``nn.Conv2d`` over non-overlapping patches, (B, C, H, W) to (B, p, H', W')."""

    def refusal(self, module: nn.Conv2d) -> str:
        patches = module.stride == module.kernel_size
        plain = module.padding == (0, 0) and module.dilation == (1, 1) and module.groups == 1
        if patches and plain:
            return ""
        return (
            "only a Conv2d over non-overlapping patches is supported (stride = kernel size, no padding, "
            "dilation or groups); freeze it or use another layer"
        )

    def forward(self, module: nn.Conv2d, names: dict[str, str], tape: Tape, anchor: torch.Tensor) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            height, width = module.kernel_size
            rows, columns = x.shape[-2] // height, x.shape[-1] // width
            cut = x[..., : rows * height, : columns * width]
            patches = cut.reshape(x.shape[0], x.shape[1], rows, height, columns, width)
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            bias = None if module.bias is None else module.bias.detach()
            out = affine(patches, module.weight.detach().flatten(1), bias, anchor, tape, names)
            return out.transpose(1, 2).reshape(x.shape[0], -1, rows, columns)

        return run
