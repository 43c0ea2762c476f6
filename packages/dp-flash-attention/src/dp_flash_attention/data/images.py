"""Images from the user's own folder, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dp_flash_attention.data.splitting import keyed_split
from dp_flash_attention.data.task import MINIMUM_RECORDS, Records, Task, private_task
from dpfa_core.errors import PrivacyParameterError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def load_images(path: Path, *, seed: int = 0, test_share: float = 0.2, side: int = 32) -> Task:
    """Reads an image classification task; every file is one private record.

    Guarantee: tested. Every image is resized by itself to a public size in RGB; nothing is measured over the folder.

    Args:
        path: folder with one sub-folder per class; the sub-folders' names become class names in sorted order.
        seed: of the split.
        test_share: expected share of records kept for testing.
        side: height and width after resizing, pixels.

    Raises:
        PrivacyParameterError: no such folder, fewer than two classes, a file that is no image, NaN, too few records.
    """
    if not path.is_dir():
        raise PrivacyParameterError(f"there is no folder {path}: check the path given with --data.")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [(file, label) for label, folder in enumerate(folders) for file in _images_in(folder)]
    if len({label for _, label in files}) < 2:
        raise PrivacyParameterError(
            f"expected a sub-folder of images for each of at least two classes in {path}, "
            f"got {len({label for _, label in files})}: arrange the files as {path.name}/CLASS/IMAGE.png."
        )
    if len(files) < MINIMUM_RECORDS:
        raise PrivacyParameterError(
            f"expected at least {MINIMUM_RECORDS} images in {path}, got {len(files)}: "
            "noise that hides one of so few hides everything."
        )
    images = torch.stack([_pixels(file, side) for file, _ in files])
    return private_task(
        name=path.name,
        kind="image",
        classes=tuple(folder.name for folder in folders),
        records=Records(images, torch.tensor([label for _, label in files])),
        is_test=keyed_split((image.numpy().tobytes() for image in images), seed=seed, test_share=test_share),
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)


def _pixels(file: Path, side: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                # Pillow would cut such values off at 255 without a word.
                values = np.asarray(image, dtype=np.float32) / (65535 if image.mode != "F" else 1)
                if not np.isfinite(values).all():
                    raise PrivacyParameterError(
                        f"expected finite pixel values, but {file} holds NaN or infinity: remove or repair it."
                    )
                if values.min() < 0 or values.max() > 1:
                    raise PrivacyParameterError(
                        f"expected pixel values from 0 to {'1' if image.mode == 'F' else '65535'} in {file}, "
                        f"got others: save it with 8 bits per channel."
                    )
                image = Image.fromarray((values * 255).round().astype(np.uint8))
            small = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    except PrivacyParameterError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PrivacyParameterError(f"cannot read {file} as an image: remove or repair it.") from error
    return torch.from_numpy(small.copy()).permute(2, 0, 1).float() / 255
