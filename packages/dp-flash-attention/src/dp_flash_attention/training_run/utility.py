"""What the private model is worth: accuracy with an interval, beside baselines. None of it is covered by epsilon."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_flash_attention.data.task import Task
from dp_flash_attention.models import StartingPoint, bag_of_words
from dp_flash_attention.models.baselines import (
    accuracy_interval,
    correct_predictions,
    fine_tune_without_privacy,
    majority_accuracy,
)
from dp_flash_attention.training_run.averaging import Average
from dp_flash_attention.training_run.progress import Report, Screen
from dp_flash_attention.training_run.settings import Settings
from dpfa_training import engine_of, make_private_with_epsilon


@dataclass(frozen=True)
class Utility:
    """Shares of the test records classified rightly."""

    accuracy: float
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy."""
    nonprivate: float
    majority: float
    private_bag_of_words: float | None
    """At the same (epsilon, delta); texts only."""

    def baselines(self) -> dict[str, float]:
        """The others, by the names that tables show."""
        shown = {"not private": self.nonprivate, "majority class": self.majority}
        if self.private_bag_of_words is not None:
            shown["private bag of words"] = self.private_bag_of_words
        return shown


def measure(task: Task, start: StartingPoint, trained: nn.Module, settings: Settings, screen: Screen) -> Utility:
    """Evaluate `trained`, and train the baselines on the same records; their weights are thrown away.

    Args:
        start: holds the module as it was before private training.
        trained: the same module afterwards.
    """
    test = start.encode(task.test), task.test.labels
    right = correct_predictions(trained, *test)
    with screen.task("baseline without privacy") as progress:
        plain = fine_tune_without_privacy(
            start.module, start.encode(task.train), task.train.labels, seed=settings.public_seed, progress=progress
        )
    bag = None
    if task.kind == "text":
        with screen.task("private bag of words") as progress:
            bag = _bag_of_words(task, settings, progress)
    return Utility(
        accuracy=right / len(task.test),
        interval=accuracy_interval(right, len(task.test)),
        nonprivate=correct_predictions(plain, *test) / len(task.test),
        majority=majority_accuracy(task),
        private_bag_of_words=bag,
    )


def _bag_of_words(task: Task, settings: Settings, progress: Report) -> float:
    """Test accuracy of the private linear baseline, trained to the same (epsilon, delta) on a ledger of its own."""
    start = bag_of_words(task)
    recipe = start.recipe
    rows = TensorDataset(start.encode(task.train), task.train.labels)
    module, optimizer, loader = make_private_with_epsilon(
        module=start.module.train(),
        optimizer=recipe.make_optimizer(start.module.parameters()),
        data_loader=DataLoader(rows, batch_size=recipe.expected_batch_size),
        target_epsilon=settings.epsilon,
        target_delta=settings.chosen_delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        seed=settings.seed,
    )
    steps, average = recipe.epochs * len(loader), Average(module, recipe.average_decay)
    for step, (words, labels) in enumerate(loader.draws(steps), start=1):
        F.cross_entropy(module(words), labels).backward()
        optimizer.step()
        average.update(module)
        progress(step, steps)
    engine_of(module).detach()
    average.store(module)
    return correct_predictions(module, start.encode(task.test), task.test.labels) / len(task.test)
