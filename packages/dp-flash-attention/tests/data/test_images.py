from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dp_flash_attention.data import load_task
from dpfa_core.errors import PrivacyParameterError


def paint(path: Path, shade: int, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (10, 14), shade if mode == "L" else (shade, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(20):
        paint(tmp_path / "cats" / f"{i}.png", i)
        paint(tmp_path / "dogs" / "young" / f"{i}.PNG", 100 + i, "RGB")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_subfolders_become_classes_and_images_one_size(folder: Path) -> None:
    task = load_task(str(folder))
    assert task.kind == "image"
    assert task.classes == ("cats", "dogs")
    images = torch.cat([task.train.inputs, task.test.inputs])
    assert images.shape == (40, 3, 32, 32)
    labels = torch.cat([task.train.labels, task.test.labels])
    red = images[:, 0].flatten(1).mean(dim=1) * 255
    assert red[labels == 0].max() < 20
    assert red[labels == 1].min() > 99


def test_a_file_that_is_no_image_is_named(folder: Path) -> None:
    (folder / "dogs" / "broken.jpg").write_bytes(b"no jpeg")
    with pytest.raises(PrivacyParameterError, match=r"cannot read .*broken\.jpg as an image"):
        load_task(str(folder))


def test_a_cut_off_image_is_named(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cats" / "cut.png")
    file = folder / "cats" / "cut.png"
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(PrivacyParameterError, match=r"cannot read .*cut\.png as an image"):
        load_task(str(folder))


@pytest.mark.parametrize(
    ("value", "sentence"), [(np.nan, "holds NaN or infinity"), (np.inf, "holds NaN or infinity"), (7.0, "from 0 to 1")]
)
def test_float_images_must_be_finite_and_in_range(folder: Path, value: float, sentence: str) -> None:
    pixels = np.full((8, 8), 0.5, dtype=np.float32)
    pixels[3, 3] = value
    Image.fromarray(pixels).save(folder / "cats" / "float.tiff")
    with pytest.raises(PrivacyParameterError, match=sentence):
        load_task(str(folder))


def test_sixteen_bit_images_keep_their_shades(folder: Path) -> None:
    file = folder / "cats" / "deep.png"
    Image.fromarray(np.full((8, 8), 65535 // 2, dtype=np.uint16)).save(file)
    task = load_task(str(folder))
    images = torch.cat([task.train.inputs, task.test.inputs])
    assert ((images - 0.5).abs() < 0.01).flatten(1).all(dim=1).sum() == 1


@pytest.mark.parametrize("keep", [[], ["cats"]])
def test_fewer_than_two_classes_are_refused(tmp_path: Path, keep: list[str]) -> None:
    for name in keep:
        for i in range(30):
            paint(tmp_path / name / f"{i}.png", i)
    with pytest.raises(PrivacyParameterError, match=rf"at least two classes in .*, got {len(keep)}"):
        load_task(str(tmp_path))


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", 1)
    paint(tmp_path / "b" / "1.png", 2)
    with pytest.raises(PrivacyParameterError, match=r"at least 20 images in .*, got 2"):
        load_task(str(tmp_path))
