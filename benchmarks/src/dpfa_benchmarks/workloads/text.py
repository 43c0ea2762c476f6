"""The main job's text transformer on drawn words, of varying length."""

from __future__ import annotations

import torch

from dpfa_benchmarks.workloads.workload import Model, Workload, fresh


def _build(batch: int, toy: bool) -> Workload:
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
    return Workload(fresh(lambda: TextTransformer(classes=2)), tokens, labels)


TEXT = Model(batch=250, build=_build)
