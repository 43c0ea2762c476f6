from pathlib import Path

import pytest
import torch

from dp_flash_attention.data import synthetic_digits as module
from dp_flash_attention.data.synthetic_digits import draw_digits, synthetic_digits


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT", 200)


def test_pixels_are_counts_of_inked_dots_and_classes_are_even() -> None:
    drawn = draw_digits(300, seed=5)
    counts = drawn.inputs * 16
    assert drawn.inputs.shape == (300, 1, 8, 8)
    assert torch.equal(counts, counts.round())
    assert 0 <= counts.min() <= counts.max() == 16
    assert drawn.labels.bincount().tolist() == [30] * 10


def test_the_seed_decides_what_is_drawn() -> None:
    first, again, other = (draw_digits(100, seed=seed).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_image_is_blank_and_the_classes_differ() -> None:
    drawn = draw_digits(1000, seed=2)
    assert drawn.inputs.flatten(1).sum(dim=1).min() > 2
    means = torch.stack([drawn.inputs[drawn.labels == digit].mean(dim=0) for digit in range(10)]).flatten(1)
    assert torch.pdist(means).min() > 0.3


def test_fonts_and_pens_can_be_held_out() -> None:
    typed = draw_digits(100, seed=0, fonts=("cmr10",), pens=lambda digit, style: False)
    written = draw_digits(100, seed=0, fonts=(), pens=lambda digit, style: style == 0)
    assert typed.labels.bincount().tolist() == written.labels.bincount().tolist() == [10] * 10


@pytest.mark.usefixtures("few")
def test_a_second_call_reads_what_the_first_one_drew(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = synthetic_digits(folder=tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (200, 200)
    steps.clear()
    again = synthetic_digits(folder=tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert not steps
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)


@pytest.mark.usefixtures("few")
def test_a_damaged_cache_file_is_drawn_anew(tmp_path: Path) -> None:
    first = synthetic_digits(folder=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        assert torch.equal(synthetic_digits(folder=tmp_path).inputs, first.inputs)
        assert file.read_bytes() == whole
