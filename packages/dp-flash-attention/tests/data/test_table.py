from pathlib import Path

import polars
import pytest

from dp_flash_attention.data import load_task
from dp_flash_attention.data.table import load_table
from dpfa_core.errors import PrivacyParameterError

TEXTS = [f"text, number {i}" for i in range(60)]
LABELS = ["yes" if i % 3 else "no" for i in range(60)]


def save(folder: Path, suffix: str, texts: list[str | None] = TEXTS, labels: list[str | None] = LABELS) -> Path:
    frame = polars.DataFrame({"text": texts, "label": labels})
    path = folder / f"reviews{suffix}"
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix in (".jsonl", ".ndjson"):
        frame.write_ndjson(path)
    else:
        frame.write_csv(path, separator="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = load_task(str(save(tmp_path, suffix)))
    assert task.kind == "text"
    assert task.classes == ("no", "yes")
    pairs = {
        (text, task.classes[label])
        for part in (task.train, task.test)
        for text, label in zip(part.inputs, part.labels.tolist(), strict=True)
    }
    assert pairs == set(zip(TEXTS, LABELS, strict=True))
    reference = load_table(save(tmp_path, ".csv"))
    assert (task.train.inputs, task.test.inputs) == (reference.train.inputs, reference.test.inputs)


def test_numbers_are_fine_as_labels(tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    polars.DataFrame({"text": TEXTS, "label": [i % 2 for i in range(60)]}).write_ndjson(path)
    assert load_table(path).classes == ("0", "1")


@pytest.mark.parametrize(
    ("texts", "labels", "sentence"),
    [
        (TEXTS, ["yes"] * 60, "at least two classes, got 1"),
        ([*TEXTS[:-1], ""], LABELS, "1 of 60 are empty"),
        ([*TEXTS[:-1], None], LABELS, "1 of 60 are empty"),
        (TEXTS, [*LABELS[:-1], None], "row 60 has none"),
        (TEXTS[:10], LABELS[:10], "at least 20 records in reviews.csv, got 10"),
        (TEXTS, TEXTS, "60 different labels in 60 rows"),
    ],
)
def test_unusable_contents_get_one_sentence(
    tmp_path: Path, texts: list[str | None], labels: list[str | None], sentence: str
) -> None:
    with pytest.raises(PrivacyParameterError, match=sentence):
        load_table(save(tmp_path, ".csv", texts, labels))


def test_a_wrong_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    path = save(tmp_path, ".csv")
    with pytest.raises(
        PrivacyParameterError, match=r"no column 'review'; its columns are text, label: .* --text-column"
    ):
        load_table(path, text_column="review")
    with pytest.raises(PrivacyParameterError, match=r"no column 'stars'.* --label-column"):
        load_table(path, label_column="stars")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("reviews.xlsx", b"x", "cannot tell the format of reviews.xlsx"),
        ("empty.csv", b"", "cannot read empty.csv as csv"),
        ("broken.parquet", b"no parquet", "cannot read broken.parquet as parquet"),
        ("broken.jsonl", b'{"text": "a"\n', "cannot read broken.jsonl as jsonl"),
        ("latin.csv", b"text,label\ncaf\xe9,1\n", "cannot read latin.csv as csv"),
    ],
)
def test_an_unreadable_file_gets_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrivacyParameterError, match=sentence) as caught:
        load_task(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.csv", "absent"])
def test_a_missing_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(PrivacyParameterError, match="there is no file"):
        load_task(str(tmp_path / name))
