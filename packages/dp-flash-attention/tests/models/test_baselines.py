import math

import pytest
import torch
from torch import nn

from dp_flash_attention.data.task import Records, private_task
from dp_flash_attention.models.baselines import (
    accuracy_interval,
    correct_predictions,
    fine_tune_without_privacy,
    majority_accuracy,
)


@pytest.mark.parametrize(("correct", "records"), [(0, 10), (7, 10), (290, 360), (360, 360)])
def test_the_interval_is_wilsons(correct: int, records: int) -> None:
    z, p = 1.959963984540054, correct / records
    middle = (p + z**2 / (2 * records)) / (1 + z**2 / records)
    half = z / (1 + z**2 / records) * math.sqrt(p * (1 - p) / records + z**2 / (4 * records**2))
    low, high = accuracy_interval(correct, records)
    assert low == pytest.approx(middle - half, abs=1e-9)
    assert high == pytest.approx(middle + half, abs=1e-9)
    assert low <= p <= high + 1e-12


def test_the_majority_is_that_of_the_training_part() -> None:
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0])
    records = Records(torch.zeros(8, 1, 1, 1), labels)
    is_test = torch.arange(8) >= 4
    task = private_task(name="t", kind="image", classes=("a", "b"), records=records, is_test=is_test)
    assert majority_accuracy(task) == 0.25


def test_fine_tuning_learns_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(600, 4)
    labels = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    steps: list[tuple[int, int]] = []
    tuned = fine_tune_without_privacy(
        model, inputs, labels, learning_rate=0.05, progress=lambda done, total: steps.append((done, total))
    )
    assert correct_predictions(tuned, inputs, labels) > 0.95 * 600
    assert torch.equal(model[0].weight, before)
    assert steps[-1] == (100, 100)
