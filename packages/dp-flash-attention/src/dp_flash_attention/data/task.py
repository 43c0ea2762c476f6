"""What every data source is turned into."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dpfa_core.errors import PrivacyParameterError

MINIMUM_RECORDS = 20


@dataclass(frozen=True, eq=False)
class Records:
    """Labelled records, one person's contribution per row.

    Guarantee: tested. Inputs are finite and as many as the labels.

    Args:
        inputs: images (N, channels, height, width), float32 in [0, 1]; or a tuple of N texts.
        labels: int64 (N,), an index into the task's classes.

    Raises:
        PrivacyParameterError: lengths differ, no record, a NaN or infinite pixel, an empty text.
    """

    inputs: Tensor | tuple[str, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or len(self.labels) == 0:
            raise PrivacyParameterError(
                f"expected one label for each of at least one record, got {len(self.inputs)} records "
                f"and {len(self.labels)} labels."
            )
        if isinstance(self.inputs, Tensor):
            broken = ~self.inputs.flatten(1).isfinite().all(dim=1)
            if broken.any():
                raise PrivacyParameterError(
                    f"expected finite pixel values, but {int(broken.sum())} of {len(broken)} images hold NaN "
                    f"or infinity (the first is number {int(broken.nonzero()[0])}): remove or repair them."
                )
        else:
            empty = [i for i, text in enumerate(self.inputs) if not text.strip()]
            if empty:
                raise PrivacyParameterError(
                    f"expected a text in every record, but {len(empty)} of {len(self.inputs)} are empty "
                    f"(the first is number {empty[0]}): remove or fill them."
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The inputs of an image task, (N, channels, height, width); PrivacyParameterError for texts."""
        if isinstance(self.inputs, Tensor):
            return self.inputs
        raise PrivacyParameterError("expected records with images, got texts: choose a model for texts.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The inputs of a text task; PrivacyParameterError for images."""
        if isinstance(self.inputs, Tensor):
            raise PrivacyParameterError("expected records with texts, got images: choose a model for images.")
        return self.inputs

    def select(self, index: Tensor) -> Records:
        """The records at `index`, int64 (n,), in that order."""
        inputs = self.inputs
        chosen = inputs[index] if isinstance(inputs, Tensor) else tuple(inputs[i] for i in index.tolist())
        return Records(chosen, self.labels[index])


@dataclass(frozen=True)
class Source:
    """Where records came from, and whether their owner declares them public or private."""

    name: str
    visibility: Literal["public", "private"]
    records: int


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task: private records to train on, records to test on, and what is public about them.

    Guarantee: tested. Train and test share the classes, and the training labels show at least two of them.

    Args:
        name: short name for reports, "digits" or a file name.
        kind: what `inputs` holds.
        classes: names of the labels, public by declaration.
        train: records that a private run may use under its guarantee.
        test: records for the final accuracy.
        sources: one declaration per source; the first is the one trained on.
        not_covered: what leaves the run without noise, one sentence each, for the privacy statement.

    Raises:
        PrivacyParameterError: fewer than two classes, or a label outside them.
    """

    name: str
    kind: Literal["image", "text"]
    classes: tuple[str, ...]
    train: Records
    test: Records
    sources: tuple[Source, ...]
    not_covered: tuple[str, ...]

    def __post_init__(self) -> None:
        seen = self.train.labels.unique()
        if len(self.classes) < 2 or len(seen) < 2:
            raise PrivacyParameterError(
                f"expected training records of at least two classes, got {len(seen)} "
                f"({', '.join(self.classes[i] for i in seen.tolist()) or 'none'}): "
                "add records of another class, or name another label column."
            )
        for records in (self.train, self.test):
            if int(records.labels.min()) < 0 or int(records.labels.max()) >= len(self.classes):
                raise PrivacyParameterError(f"expected labels from 0 to {len(self.classes) - 1}.")

    def digest(self, key: bytes) -> str:
        """A keyed fingerprint of all records, to recognise the same data when a run is resumed.

        Guarantee: tested. Another record, order or split gives another digest. It says nothing without the key;
        an unkeyed hash of private data would let anyone who guesses the data confirm the guess.

        Args:
            key: the run's secret, kept out of reports.
        """
        mac = hmac.new(key, digestmod=hashlib.sha256)
        for records in (self.train, self.test):
            mac.update(repr((len(records), self.classes)).encode())
            mac.update(records.labels.numpy().tobytes())
            if isinstance(records.inputs, Tensor):
                mac.update(repr(tuple(records.inputs.shape)).encode())
                mac.update(records.inputs.contiguous().numpy().tobytes())
            else:
                for text in records.inputs:
                    mac.update(hashlib.sha256(text.encode()).digest())
        return mac.hexdigest()


def private_task(
    *, name: str, kind: Literal["image", "text"], classes: tuple[str, ...], records: Records, is_test: Tensor
) -> Task:
    """A task of the user's own records: both parts private, with the list of what is not covered."""
    train, test = records.select((~is_test).nonzero()[:, 0]), records.select(is_test.nonzero()[:, 0])
    return Task(
        name=name,
        kind=kind,
        classes=classes,
        train=train,
        test=test,
        sources=(
            Source(f"{name}, training part", "private", len(train)),
            Source(f"{name}, test part", "private", len(test)),
        ),
        not_covered=(
            f"The number of records is treated as public: {len(train)} to train on, {len(test)} to test on.",
            f"The set of class names is treated as public: {', '.join(classes)}.",
            "The test accuracy is computed on private test records without noise: it is a release of its own.",
            "Error messages about single records are meant for the owner of the data only.",
        ),
    )
