"""What a workload is: one model, one batch, and the loss of each of its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One model and one batch; ``model()`` gives the same fresh weights each time."""

    model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    """(B,) classes, or (B, T) tokens to predict."""

    def losses(self, output: Any, labels: Tensor) -> Tensor:
        """(B,) cross-entropies; of a sequence the mean over its own tokens."""
        logits: Tensor = getattr(output, "logits", output)
        if labels.dim() == 1:
            return F.cross_entropy(logits, labels, reduction="none")
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)

    def loss(self, model: nn.Module) -> Tensor:
        return self.losses(model(self.inputs), self.labels).mean()


@dataclass(frozen=True)
class Model:
    """How to make a workload.

    Args:
        batch: rows where none are asked for.
        build: (rows, whether it shall be so small that a test takes a second) to the workload.
    """

    batch: int
    build: Callable[[int, bool], Workload]


def fresh(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` with the same weights at every call, none of them at the zero that some layers start from."""

    def model() -> nn.Module:
        # Where a weight is zero, most gradients vanish: a gate there would compare little.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = make()
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return module

    return model


def words_by_class(batch: int, length: int, words: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Drawn (tokens (B, length), labels (B,)) of two classes that share no word; tokens begin at `first`.

    Gradients of labels that nothing explains would cancel, and a sum of what cancels has no digits left to
    compare.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    half = (words - first) // 2
    tokens = torch.randint(first, first + half, (batch, length), generator=generator) + half * labels[:, None]
    return tokens, labels
