"""Models and batches that the training cases share: those of the main job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODELS = ("vit", "text")


@dataclass(frozen=True)
class Workload:
    """One model and one batch; ``model()`` gives the same fresh weights each time."""

    model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.inputs), self.labels)


def workload(name: str, batch: int) -> Workload:
    """The ViT on real digits, or the text transformer on drawn words of varying length.

    Raises: ValueError for another model or a batch that the digits cannot fill.
    """
    if name == "vit":
        return _vit(batch)
    if name == "text":
        return _text(batch)
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}.")


def _vit(batch: int) -> Workload:
    from dp_flash_attention.data.digits import digits
    from dp_flash_attention.models.vit import VisionTransformer

    task = digits()
    images = task.train.inputs
    if not isinstance(images, Tensor) or not 1 <= batch <= len(images):
        raise ValueError(f"batch must be between 1 and the {len(images)} training digits, got {batch}.")
    return Workload(lambda: _fresh(lambda: VisionTransformer(classes=10)), images[:batch], task.train.labels[:batch])


def _text(batch: int) -> Workload:
    from dp_flash_attention.models.hashed_words import HashedWords
    from dp_flash_attention.models.text import TextTransformer

    words = HashedWords()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    # Each class has words of its own: gradients of random labels would cancel, and a sum of what cancels has
    # no digits left to compare.
    half = words.buckets // 2
    tokens = torch.randint(1, half + 1, (batch, words.length), generator=generator) + half * labels[:, None]
    lengths = torch.randint(words.length // 8, words.length + 1, (batch, 1), generator=generator)
    tokens = torch.where(torch.arange(words.length) < lengths, tokens, 0)
    return Workload(lambda: _fresh(lambda: TextTransformer(classes=2)), tokens, labels)


def _fresh(make: Callable[[], nn.Module]) -> nn.Module:
    # Some layers start at zero, where most gradients vanish: a gate there would compare little.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model
