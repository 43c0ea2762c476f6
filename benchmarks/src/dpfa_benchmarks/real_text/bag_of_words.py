"""What the tasks are compared with: a linear head on word counts, trained where the texts are, privately or not."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_flash_attention import make_private_with_epsilon
from dp_flash_attention.models.bag_of_words import BagOfWords
from dpfa_benchmarks.real_text.tasks import DELTA, Split

EPOCHS, BATCH, LEARNING_RATE, CLIP = 5, 1000, 8.0, 0.5
"""Chosen on public texts: learning rates of 2, 8 and 16 were tried."""


def bag_of_words(split: Split, words: int, epsilon: float) -> float:
    """Test accuracy after DP-SGD: one text with its label is a record, the weights leave. Without noise at inf."""
    module: nn.Module = BagOfWords(classes=split.classes, buckets=words)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=0.9)
    batch = min(BATCH, len(split.train))
    loader = DataLoader(TensorDataset(split.train, split.train_labels), batch_size=batch, shuffle=True)
    if math.isfinite(epsilon):
        module, optimizer, loader = make_private_with_epsilon(
            module=module,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=DELTA,
            epochs=EPOCHS,
            max_grad_norm=CLIP,
        )
    for _ in range(EPOCHS):
        for texts, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(texts), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return float((module(split.test).argmax(1) == split.test_labels).float().mean())
