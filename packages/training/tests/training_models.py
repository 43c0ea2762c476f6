"""Small models that the tests share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpfa_training import clipped_gradients


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


Loss = Callable[[nn.Module, Any], torch.Tensor]


def assert_exact(module: nn.Module, losses: Loss, batch: Any, *, tolerance: float = 1e-5, shares: Any = (0.5,)) -> None:
    """Norms, sums and clipped sums of the engine against plain autograd in float64, one sample at a time.

    Each bound is `shares` times the median norm. The norms may lie above the exact ones by 1e-4, and by no
    more than rounding below.
    """
    plain = copy.deepcopy(module).double()
    rows = len(torch.utils._pytree.tree_leaves(batch)[0])
    names = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    exact = []
    for index in range(rows):
        own = torch.utils._pytree.tree_map(lambda x, at=index: _double(x[at : at + 1]), batch)
        found = torch.autograd.grad(losses(plain, own).sum(), list(names.values()), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(names.values(), found, strict=True)]
        exact.append(torch.cat([gradient.flatten() for gradient in filled]))
    gradients = torch.stack(exact)
    norms = gradients.norm(dim=1)
    for bound in (math.inf, *(share * float(norms.median()) for share in shares)):
        sums, found_norms = clipped_gradients(module, losses, batch, max_grad_norm=bound)
        assert torch.all(found_norms >= norms * (1 - 1e-6 - tolerance / 10)), (found_norms / norms).min()
        assert torch.all(found_norms <= norms * (1 + 1e-4 + tolerance)), (found_norms / norms).max()
        factors = (bound / found_norms).clamp(max=1)
        truth = (factors[:, None] * gradients).sum(0)
        zero = {name: torch.zeros_like(p) for name, p in names.items()}
        ours = torch.cat([(zero | sums)[name].double().flatten() for name in names])
        error = float((ours - truth).norm() / truth.norm())
        assert error <= tolerance, (error, _where(ours, truth, names))


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def _where(ours: torch.Tensor, truth: torch.Tensor, names: dict[str, torch.Tensor]) -> dict[str, float]:
    sizes = [p.numel() for p in names.values()]
    parts = zip(names, ours.split(sizes), truth.split(sizes), strict=True)
    return {name: float((a - b).norm() / truth.norm()) for name, a, b in parts if (a - b).norm() > 1e-6 * truth.norm()}
