"""Docs take their numbers from the newest record, with command and machine beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dpfa_benchmarks import plot
from dpfa_benchmarks.record import Record, append

MakeRecord = Callable[..., Record]


def test_the_newest_record_of_each_setting_is_shown(tmp_path: Path, a_record: MakeRecord) -> None:
    old, new = a_record(), replace(a_record(), time="2026-02-01T00:00:00+00:00", command="newer")
    other = replace(a_record(), parameters={"batch": 8})
    for record in (new, old, other):
        append(tmp_path / "case.jsonl", record)
    assert plot.newest(tmp_path) == [new, other]


def test_a_parameter_that_a_case_gained_does_not_part_its_records_and_parts_have_their_own_picture(
    tmp_path: Path, a_record: MakeRecord
) -> None:
    new = {"batch": 4, "model": "m", "toy": False, "physical_batch": 0, "peer_path": "/a/b"}
    old = replace(a_record(), parameters={"batch": 4, "model": "m"})
    later = replace(old, time="2026-02-01T00:00:00+00:00", parameters=new)
    parts = replace(later, parameters={**new, "physical_batch": [2, 0, "auto"]})
    for record in (old, later, parts):
        append(tmp_path / "case.jsonl", record)
    assert plot.newest(tmp_path) == [later, parts]
    assert [plot.slug(record) for record in (later, parts)] == ["case-m", "case-m-rows-2-all-auto"]


def test_picture_and_table_carry_command_machine_and_reasons(tmp_path: Path, a_record: MakeRecord) -> None:
    files = plot.write([a_record()], tmp_path / "out")
    assert {path.name for path in files} == {"case.svg", "tables.md"}
    text = (tmp_path / "out" / "tables.md").read_text()
    for part in ("python -m dpfa_benchmarks run case", "2 cores", "not installed", "torch 1", "no commit"):
        assert part in text


def test_the_same_record_gives_the_same_picture(tmp_path: Path, a_record: MakeRecord) -> None:
    one, two = (plot.write([a_record()], tmp_path / name)[0].read_bytes() for name in "ab")
    assert one == two


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--record"):
        plot.newest(tmp_path)


def test_the_main_jobs_accuracy_is_shown_with_its_command_and_epsilon_rounded_up(
    tmp_path: Path, a_record: MakeRecord
) -> None:
    record = a_record()
    append(tmp_path / "case.jsonl", record)
    run = {"seed": 0, "test_accuracy": 0.9, "baseline_nonprivate": 0.95, "baseline_majority": 0.1}
    run |= {"epsilon": 2.99991, "delta": 1e-4, "seconds": 60.0}
    found = {"command": "python -m dpfa_benchmarks.utility", "runs": [run], "mean": 0.9, "lowest": 0.9, "highest": 0.9}
    found |= {"standard_error": None, "threads": "1", "time": record.time, "commit": None, "dirty": None}
    found |= {"machine": record.machine, "versions": record.versions}
    (tmp_path / "utility").mkdir()
    other = json.dumps({"what": "something else", "command": "another"})
    (tmp_path / "utility" / "job.jsonl").write_text(f"{json.dumps(found)}\n{other}\n")
    plot.write_page(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text.index("$ python -m dpfa_benchmarks.utility") < text.index(record.command)
    assert "| 0 | 90.0% | 95.0% | 10.0% | 3.0000 at 0.0001 | 60 |" in text
    assert "another" not in text
