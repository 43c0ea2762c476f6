import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dp_flash_attention.data import synthetic_digits
from dp_flash_attention.data.digits import digits
from dp_flash_attention.data.task import Records, Task, private_task
from dp_flash_attention.models import bag_of_words, pretraining, starting_point
from dpfa_core.errors import PrivacyParameterError


def texts() -> Task:
    records = Records(tuple(f"review number {i}" for i in range(40)), torch.arange(40) % 3)
    is_test = torch.arange(40) < 10
    return private_task(name="reviews.csv", kind="text", classes=("a", "b", "c"), records=records, is_test=is_test)


def pictures() -> Task:
    records = Records(torch.rand(40, 3, 32, 32), torch.arange(40) % 2)
    is_test = torch.arange(40) < 10
    return private_task(name="photos", kind="image", classes=("a", "b"), records=records, is_test=is_test)


@pytest.mark.parametrize("task", [texts(), pictures()], ids=["texts", "pictures"])
def test_the_model_takes_what_encode_gives(task: Task) -> None:
    start = starting_point(task)
    logits = start.module(start.encode(task.train))
    assert logits.shape == (30, len(task.classes))
    assert start.sources == ()
    assert start.recipe.expected_batch_size <= 30


def test_the_seed_decides_the_first_weights_and_spares_the_global_state() -> None:
    state = torch.get_rng_state()
    first, again, other = (starting_point(texts(), seed=seed).module.words.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_linear_baseline_shares_the_words() -> None:
    task = texts()
    baseline, start = bag_of_words(task), starting_point(task)
    assert torch.equal(baseline.encode(task.test), start.encode(task.test))
    assert baseline.module(baseline.encode(task.test)).shape == (10, 3)


def test_the_digits_start_from_the_public_pre_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pretraining, synthetic_digits):
        monkeypatch.setattr(module, "COUNT", 300)
    monkeypatch.setattr(pretraining, "EPOCHS", 1)
    start = starting_point(digits(), folder=tmp_path)
    assert [source.visibility for source in start.sources] == ["public"]
    assert start.sources[0].records == 300
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_directory_is_for_texts() -> None:
    with pytest.raises(PrivacyParameterError, match="photos holds images"):
        starting_point(pictures(), model="somewhere")


def test_heavy_libraries_are_imported_only_when_needed() -> None:
    code = "import sys, dp_flash_attention.data, dp_flash_attention.models; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"sklearn", "matplotlib", "polars", "transformers", "PIL", "scipy"} & set(modules)
