from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dp_flash_attention.data import synthetic_digits
from dp_flash_attention.data.synthetic_digits import draw_digits
from dp_flash_attention.models import pretraining
from dp_flash_attention.models.baselines import correct_predictions
from dp_flash_attention.models.pretraining import pretrain, pretrained_digits_vit


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pretraining, synthetic_digits):
        monkeypatch.setattr(module, "COUNT", 300)
    monkeypatch.setattr(pretraining, "EPOCHS", 1)


def test_it_learns_to_read_drawn_digits() -> None:
    steps: list[tuple[int, int]] = []
    drawn, unseen = draw_digits(2000, seed=0), draw_digits(500, seed=1)
    model = pretrain(drawn, epochs=4, progress=lambda done, total: steps.append((done, total)))
    # Guessing reads 50 of 500 with a standard deviation of 7.
    assert correct_predictions(model, unseen.inputs, unseen.labels) > 80
    assert steps[-1] == (8000, 8000)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.usefixtures("few")
def test_the_second_call_reads_the_first_ones_weights(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    random_state = torch.get_rng_state()
    first = pretrained_digits_vit(folder=tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (600, 600)
    assert torch.equal(torch.get_rng_state(), random_state)
    steps.clear()
    again = pretrained_digits_vit(folder=tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert not steps
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("few")
def test_the_file_says_what_it_was_trained_on(tmp_path: Path) -> None:
    pretrained_digits_vit(folder=tmp_path)
    (file,) = tmp_path.glob("digits-vit-*")
    with safe_open(file, "pt") as weights:
        assert weights.metadata()["data"] == "public"
        assert "300 drawn digits" in weights.metadata()["trained_on"]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("content", [b"", b"damaged" * 100])
def test_a_damaged_file_is_made_anew(tmp_path: Path, content: bytes) -> None:
    pretrained_digits_vit(folder=tmp_path)
    (file,) = tmp_path.glob("digits-vit-*")
    file.write_bytes(content)
    pretrained_digits_vit(folder=tmp_path)
    assert file.stat().st_size > 10_000
