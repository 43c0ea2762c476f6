"""A record says everything, is refused when it does not, and is never rewritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpfa_benchmarks.record import Quantiles, Record, Result, append, read

MakeRecord = Callable[..., Record]


def test_a_record_survives_json(tmp_path: Path, a_record: MakeRecord) -> None:
    append(tmp_path / "case.jsonl", a_record())
    assert read(tmp_path / "case.jsonl") == [a_record()]


def test_appending_leaves_earlier_lines_alone(tmp_path: Path, a_record: MakeRecord) -> None:
    path = tmp_path / "case.jsonl"
    append(path, a_record())
    before = path.read_text()
    append(path, replace(a_record(), repeats=4))
    assert path.read_text().startswith(before)
    assert [record.repeats for record in read(path)] == [3, 4]


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_a_record_with_a_wrong_gradient_cannot_exist(error: float, a_record: MakeRecord) -> None:
    with pytest.raises(ValueError, match="error of ours"):
        a_record(error)


def test_a_missing_or_foreign_key_is_named(a_record: MakeRecord) -> None:
    data = json.loads(json.dumps(a_record().to_json()))
    del data["machine"]
    data["speedup"] = 3
    with pytest.raises(ValueError, match=r"machine.*speedup"):
        Record.from_json(data)


def test_every_contender_that_ran_needs_its_ratio(a_record: MakeRecord) -> None:
    with pytest.raises(ValueError, match="one ratio"):
        replace(a_record(), ratios={})


def test_a_contender_has_seconds_or_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Result(name="peer", what="peer")


def test_quantiles_are_values_that_were_measured() -> None:
    assert Quantiles.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Quantiles(p20=1.0, p50=3.0, p80=4.0)


def test_the_records_of_the_repository_can_be_read() -> None:
    folder = Path(__file__).parents[1] / "records"
    for path in folder.glob("*.jsonl"):
        assert read(path), path
