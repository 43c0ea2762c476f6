"""From the word after --data to a task."""

from __future__ import annotations

from pathlib import Path

from dp_flash_attention.data.task import Task
from dpfa_core.errors import PrivacyParameterError


def load_task(data: str = "digits", *, text_column: str = "text", label_column: str = "label", seed: int = 0) -> Task:
    """The bundled digits, a file of labelled texts, or a folder of images per class.

    Guarantee: tested. What cannot be used raises one sentence that says what was expected and what to do.

    Args:
        data: "digits", a file (CSV, TSV, JSON Lines, Parquet) or a folder.
        text_column: of a file.
        label_column: of a file.
        seed: of the split into training and test records.

    Raises:
        PrivacyParameterError: see `load_table` and `load_images`.
    """
    path = Path(data).expanduser()
    if data == "digits":
        from dp_flash_attention.data.digits import digits

        return digits(seed=seed)
    if path.is_dir():
        from dp_flash_attention.data.images import load_images

        return load_images(path, seed=seed)
    if not path.exists() and not path.suffix:
        raise PrivacyParameterError(
            f'there is no file or folder {data}: expected "digits", a file of texts or a folder of images after --data.'
        )
    from dp_flash_attention.data.table import load_table

    return load_table(path, text_column=text_column, label_column=label_column, seed=seed)
