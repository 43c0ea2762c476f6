"""Texts with labels from the user's own CSV, JSON Lines or Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dp_flash_attention.data.splitting import keyed_split
from dp_flash_attention.data.task import MINIMUM_RECORDS, Records, Task, private_task
from dpfa_core.errors import PrivacyParameterError

if TYPE_CHECKING:
    import polars

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def load_table(
    path: Path, *, text_column: str = "text", label_column: str = "label", seed: int = 0, test_share: float = 0.2
) -> Task:
    """Reads a text classification task; every row is one private record.

    Guarantee: tested. Nothing about the texts is learned here; rows are split by `keyed_split` over their texts.

    Args:
        path: file whose suffix is one of `SUFFIXES`.
        text_column: column of texts.
        label_column: column of labels; they become class names in sorted order.
        seed: of the split.
        test_share: expected share of records kept for testing.

    Raises:
        PrivacyParameterError: no such file, an unknown suffix, an unreadable file, a missing column, an empty text
            or label, too few records, one class only, or a label column that is no set of classes.
    """
    frame = _read(path)
    for option, column in (("--text-column", text_column), ("--label-column", label_column)):
        if column not in frame.columns:
            raise PrivacyParameterError(
                f"{path.name} has no column {column!r}; its columns are {', '.join(frame.columns)}: "
                f"name one of them with {option}."
            )
    if frame.height < MINIMUM_RECORDS:
        raise PrivacyParameterError(
            f"expected at least {MINIMUM_RECORDS} records in {path.name}, got {frame.height}: "
            "noise that hides one of so few hides everything."
        )
    texts = tuple(_as_text(value) for value in frame[text_column].to_list())
    names = [_as_text(value) for value in frame[label_column].to_list()]
    if "" in names:
        raise PrivacyParameterError(
            f"expected a label in every row of {path.name}, but row {names.index('') + 1} has none in column "
            f"{label_column!r}: remove or fill it."
        )
    classes = tuple(sorted(set(names)))
    if len(classes) > len(names) // 5:
        raise PrivacyParameterError(
            f"column {label_column!r} of {path.name} has {len(classes)} different labels in {len(names)} rows; "
            "expected at least 5 rows for each on average: name a column of classes with --label-column."
        )
    number = {name: i for i, name in enumerate(classes)}
    return private_task(
        name=path.name,
        kind="text",
        classes=classes,
        records=Records(texts, torch.tensor([number[name] for name in names])),
        is_test=keyed_split((text.encode() for text in texts), seed=seed, test_share=test_share),
    )


def _as_text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _read(path: Path) -> polars.DataFrame:
    import polars

    suffix = path.suffix.lower()
    if not path.is_file():
        raise PrivacyParameterError(f"there is no file {path}: check the path given with --data.")
    if suffix not in SUFFIXES:
        raise PrivacyParameterError(
            f"cannot tell the format of {path.name}: expected a file ending in {', '.join(SUFFIXES)}, "
            "or a folder with one sub-folder of images per class."
        )
    try:
        if suffix == ".parquet":
            return polars.read_parquet(path)
        if suffix in (".jsonl", ".ndjson"):
            return polars.read_ndjson(path, infer_schema_length=None)
        return polars.read_csv(path, separator="\t" if suffix == ".tsv" else ",", infer_schema=False)
    except (polars.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PrivacyParameterError(
            f"cannot read {path.name} as {suffix[1:]}: {reason}. Repair the file, or save it in another format."
        ) from error
