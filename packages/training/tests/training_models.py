"""Small models that the tests share."""

from __future__ import annotations

import torch
from torch import nn


class TinyViT(nn.Module):
    """Patch Conv2d, class token, positions, one attention block, head: every supported parameter kind."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y))[:, 0])


class TinyText(nn.Module):
    """Token and broadcast position embeddings, one layer used twice, masked mean, head."""

    def __init__(self, words: int = 40, width: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.positions = nn.Embedding(10, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1])[None])
        x = x + torch.tanh(self.mix(self.norm(x)))
        x = x + torch.tanh(self.mix(x))
        seen = (ids != 0).unsqueeze(-1)
        return self.head((x * seen).sum(1) / seen.sum(1).clamp(min=1))


def images(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def texts(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (rows, 9), generator=generator)
    ids[:, 6:] *= torch.rand(rows, 1, generator=generator).round().long()
    return ids, torch.randint(0, 3, (rows,), generator=generator)


def per_sample_loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def exact_gradients(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Plain autograd, one sample at a time, in float64."""
    found = []
    double = type(module)().double()
    double.load_state_dict(module.state_dict())
    names = [name for name, p in double.named_parameters()]
    for index in range(len(batch[1])):
        row = batch[0][index : index + 1]
        row = row.double() if row.is_floating_point() else row
        loss = per_sample_loss(double, (row, batch[1][index : index + 1])).sum()
        gradients = torch.autograd.grad(loss, list(double.parameters()))
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def clipped_truth(
    module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], bound: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    gradients = exact_gradients(module, batch)
    norms = torch.stack([sum(g.square().sum() for g in one.values()).sqrt() for one in gradients])
    factors = (bound / norms).clamp(max=1)
    sums = {name: sum(f * one[name] for f, one in zip(factors, gradients, strict=True)) for name in gradients[0]}
    return sums, norms
