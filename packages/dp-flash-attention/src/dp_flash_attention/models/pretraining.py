"""Public pre-training: the vision transformer learns drawn digits before it sees a real one."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save

from dp_flash_attention.data.cache import Progress, cache_folder, write_atomically
from dp_flash_attention.data.synthetic_digits import COUNT, synthetic_digits
from dp_flash_attention.data.synthetic_digits import VERSION as DRAWING
from dp_flash_attention.data.task import Records
from dp_flash_attention.models.vit import VisionTransformer

VERSION = 1
EPOCHS = 15
_BATCH = 256
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05


def pretrained_digits_vit(*, folder: Path | None = None, progress: Progress | None = None) -> VisionTransformer:
    """The vision transformer after public pre-training, made once and then read from the cache.

    Guarantee: tested. No private record is read; a second call returns the same weights; a damaged or foreign cache
    file is made anew.

    Args:
        folder: where drawn digits and weights are kept; default `cache_folder()`.
        progress: called with (images drawn and shown, in all) while weights are made, not when they are read.
    """
    folder = folder or cache_folder()
    path = folder / f"digits-vit-v{VERSION}.{DRAWING}.safetensors"
    with torch.random.fork_rng(devices=[]):
        model = VisionTransformer(classes=10)
    try:
        model.load_state_dict(load(path.read_bytes()))
    except (OSError, SafetensorError, RuntimeError, KeyError):
        total = COUNT * (1 + EPOCHS)
        digits = synthetic_digits(folder=folder, progress=progress and (lambda done, _: progress(done, total)))
        model = pretrain(digits, epochs=EPOCHS, progress=progress and (lambda done, _: progress(COUNT + done, total)))
        about = {"trained_on": f"{COUNT} drawn digits, version {DRAWING}", "data": "public", "version": str(VERSION)}
        write_atomically(path, save(model.state_dict(), metadata=about))
    return model.eval()


def pretrain(digits: Records, *, epochs: int, seed: int = 0, progress: Progress | None = None) -> VisionTransformer:
    """Trains the vision transformer on public digits, without privacy.

    Args:
        digits: public images (N, 1, 8, 8) with labels 0 to 9.
        epochs: passes over them.
        seed: of the first weights and the order; the global random state is left as it was.
        progress: called with (images shown, in all) after each step.
    """
    images, labels = digits.images, digits.labels
    steps_per_epoch = max(1, len(labels) // _BATCH)
    total = epochs * steps_per_epoch
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)
    for step in range(total):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator)
        chosen = order[(step % steps_per_epoch) * _BATCH :][:_BATCH]
        done = (step + 1) / total
        # A tenth of the way up, then down along a cosine.
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, 10 * done) * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if progress:
            progress((step + 1) * len(labels) * epochs // total, len(labels) * epochs)
    return model
