"""How each kind of model is trained: chosen on public data, written down before private data are seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from dpfa_core.errors import PrivacyParameterError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of one private training; every one of them is a public constant.

    Args:
        epochs: passes over the training records, on average.
        expected_batch_size: records of a Poisson batch on average, and the denominator of every step.
        max_grad_norm: clip threshold of one record's whole gradient, l2.
        learning_rate: constant over the run.
        optimizer: "adam", or "sgd" with momentum 0.9.
        average_decay: of the moving average of the weights that is kept in the end; 0 keeps the last weights.
        origin: where the numbers come from, one sentence for the privacy statement.
    """

    epochs: int
    expected_batch_size: int
    max_grad_norm: float
    learning_rate: float
    optimizer: Literal["adam", "sgd"]
    average_decay: float = 0.0
    origin: str

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The recipe's optimiser over `parameters`; a function of noised gradients only."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate)
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)


STEPS = 80
LARGEST_BATCH = 2048


def _batch(records: int, share: float) -> int:
    if records < 1:
        raise PrivacyParameterError(f"expected at least one training record, got {records}.")
    return min(LARGEST_BATCH, math.ceil(share * records))


def _epochs(records: int, batch: int, steps: int) -> int:
    return max(1, round(steps * batch / records))


def digits_recipe(records: int) -> Recipe:
    """For the vision transformer that was pre-trained on drawn digits."""
    batch = _batch(records, 0.35)
    return Recipe(
        epochs=_epochs(records, batch, 86),
        expected_batch_size=batch,
        max_grad_norm=0.5,
        learning_rate=2e-3,
        optimizer="adam",
        average_decay=0.95,
        origin="The hyperparameters were chosen on drawn, public digits.",
    )


def image_recipe(records: int) -> Recipe:
    """For the vision transformer from scratch."""
    batch = _batch(records, 0.25)
    return Recipe(
        epochs=_epochs(records, batch, STEPS),
        expected_batch_size=batch,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        optimizer="adam",
        average_decay=0.95,
        origin="The hyperparameters are rules of thumb, tried on no private data.",
    )


def text_recipe(records: int) -> Recipe:
    """For the text transformer from scratch."""
    batch = _batch(records, 0.25)
    return Recipe(
        epochs=_epochs(records, batch, STEPS),
        expected_batch_size=batch,
        max_grad_norm=1.0,
        learning_rate=0.07,
        optimizer="sgd",
        average_decay=0.9,
        origin="The hyperparameters were chosen on generated, public texts.",
    )


def bag_of_words_recipe(records: int) -> Recipe:
    """For the linear baseline on words."""
    batch = _batch(records, 0.25)
    return Recipe(
        epochs=_epochs(records, batch, STEPS),
        expected_batch_size=batch,
        max_grad_norm=1.0,
        learning_rate=5.0,
        optimizer="sgd",
        average_decay=0.9,
        origin="The hyperparameters were chosen on generated, public texts.",
    )


def huggingface_recipe(records: int) -> Recipe:
    """For a pre-trained transformer of the user's."""
    batch = _batch(records, 0.25)
    return Recipe(
        epochs=_epochs(records, batch, STEPS),
        expected_batch_size=batch,
        max_grad_norm=0.1,
        learning_rate=5e-4,
        optimizer="adam",
        origin="Learning rate and clip threshold follow Li et al. 2022; the rest are rules of thumb.",
    )
