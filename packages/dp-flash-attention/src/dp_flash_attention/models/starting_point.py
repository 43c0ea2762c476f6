"""Where private training starts: a model, what it needs of the records, and how to train it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dp_flash_attention.data.cache import Progress
from dp_flash_attention.data.task import Records, Source, Task
from dp_flash_attention.models.bag_of_words import BagOfWords
from dp_flash_attention.models.hashed_words import HashedWords
from dp_flash_attention.models.recipes import (
    Recipe,
    bag_of_words_recipe,
    digits_recipe,
    huggingface_recipe,
    image_recipe,
    text_recipe,
)
from dp_flash_attention.models.text import TextTransformer
from dp_flash_attention.models.vit import VisionTransformer
from dpfa_core.errors import PrivacyParameterError


@dataclass(frozen=True, eq=False)
class StartingPoint:
    """A model before its private training.

    Args:
        description: one line for reports.
        module: maps one input tensor (B, ...) to logits (B, classes); every row by itself.
        encode: records to the module's input tensor; fitted to no private record.
        recipe: hyperparameters for as many training records as the task has.
        sources: public data that the module or its encoding was made from; empty when none was.
        not_covered: what this model adds to the privacy statement, one sentence each.
    """

    description: str
    module: nn.Module
    encode: Callable[[Records], Tensor]
    recipe: Recipe
    sources: tuple[Source, ...] = ()
    not_covered: tuple[str, ...] = ()


def starting_point(
    task: Task, *, model: str | None = None, seed: int = 0, folder: Path | None = None, progress: Progress | None = None
) -> StartingPoint:
    """The model for a task: the pre-trained digits transformer, a small one from scratch, or the user's own.

    Guarantee: tested. Of the private records only their number, kind and class names are read here.

    Args:
        task: what to learn.
        model: directory of a Hugging Face model, for texts; None chooses by the task.
        seed: of weights that start at random.
        folder: of the cache for the pre-trained model; default `cache_folder()`.
        progress: called while something public is made.

    Raises:
        PrivacyParameterError: `model` cannot be used.
    """
    classes, records = len(task.classes), len(task.train)
    if model is not None:
        if task.kind != "text":
            raise PrivacyParameterError(
                f"a model directory can be used for texts, but {task.name} holds images: leave --model out."
            )
        from dp_flash_attention.models.huggingface import load_huggingface

        module, encode = load_huggingface(Path(model).expanduser(), classes=classes, seed=seed)
        return StartingPoint(
            f"Hugging Face model {Path(model).name}",
            module,
            encode,
            huggingface_recipe(records),
            not_covered=(f"What the model {Path(model).name} was trained on before is not covered.",),
        )
    if task.name == "digits":
        from dp_flash_attention.data.synthetic_digits import COUNT
        from dp_flash_attention.models.pretraining import pretrained_digits_vit

        return StartingPoint(
            "vision transformer, pre-trained on drawn digits",
            pretrained_digits_vit(folder=folder, progress=progress),
            encode_images,
            digits_recipe(records),
            sources=(Source("drawn digits", "public", COUNT),),
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task.kind == "image":
            channels, side = task.train.images.shape[1:3]
            vit = VisionTransformer(classes=classes, side=side, channels=channels, patch=4)
            return StartingPoint("vision transformer from scratch", vit, encode_images, image_recipe(records))
        text = TextTransformer(classes=classes)
    return StartingPoint("text transformer from scratch on hashed words", text, encode_words, text_recipe(records))


def bag_of_words(task: Task) -> StartingPoint:
    """The private linear baseline for a text task."""
    return StartingPoint(
        "bag of hashed words, linear",
        BagOfWords(classes=len(task.classes)),
        encode_words,
        bag_of_words_recipe(len(task.train)),
    )


def encode_images(records: Records) -> Tensor:
    """The images themselves, (N, channels, side, side)."""
    return records.images


def encode_words(records: Records) -> Tensor:
    """Word numbers of the texts, int64 (N, 96)."""
    return HashedWords()(records.texts)
