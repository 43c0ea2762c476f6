"""What a private accuracy is compared with, and how sure it is."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_attention.data.cache import Progress
from dp_flash_attention.data.task import Task


def accuracy_interval(correct: int, records: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for an accuracy.

    Guarantee: tested. It holds the observed accuracy, and closed-form values of Wilson's formula.

    Args:
        correct: records classified rightly.
        records: records classified, at least 1.
        confidence: coverage, in (0, 1).

    Source: Wilson, JASA 1927.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, records).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


@torch.no_grad()
def correct_predictions(module: nn.Module, inputs: Tensor, labels: Tensor) -> int:
    """How many rows `module` puts into their class; it is left in evaluation mode."""
    module.eval()
    return sum(
        int((module(inputs[rows]).argmax(dim=1) == labels[rows]).sum()) for rows in torch.arange(len(labels)).split(500)
    )


def majority_accuracy(task: Task) -> float:
    """Test accuracy of always naming the class that is most frequent in training; not private."""
    frequent = int(task.train.labels.bincount(minlength=len(task.classes)).argmax())
    return float((task.test.labels == frequent).double().mean())


def fine_tune_without_privacy(
    module: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `module`, fine-tuned by Adam without privacy: the accuracy that noise is compared with.

    The result is a function of single records and must not leave the trust boundary.

    Args:
        module: left as it is.
        inputs: (N, ...) as the module takes them.
        labels: int64 (N,).
        epochs: passes.
        learning_rate: at the start; it falls linearly to 0.
        seed: of the order.
        progress: called with (steps, in all).
    """
    tuned = copy.deepcopy(module).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(labels), generator=generator).split(64)]
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(tuned(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        if progress:
            progress(step + 1, len(batches))
    return tuned.eval()
