"""The page on accountants says what its record says, and the record what the accountants say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpfa_benchmarks import accountants
from dpfa_core.events import Gaussian, Laplace, NonPrivate
from dpfa_core.spending import upper_bound

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "accounting" / "accountants.jsonl"
PAGE = ROOT / "docs" / "benchmarks" / "accounting.md"


def test_the_page_is_written_from_the_newest_record() -> None:
    assert accountants.page(accountants.newest(RECORDS)) == PAGE.read_text(encoding="utf-8"), (
        f"run python -m dpfa_benchmarks.accountants --from {RECORDS} --page {PAGE}"
    )


def test_the_record_holds_enough_settings_and_pld_meets_gdp_on_plain_gaussians() -> None:
    rows = accountants.newest(RECORDS)["rows"]
    assert len(rows) >= 20
    for row in rows:
        answers = row["answers"]
        assert set(answers) == set(accountants.ACCOUNTANTS)
        if "epsilon" in answers["gdp"]:
            assert answers["pld"]["epsilon"] == pytest.approx(answers["gdp"]["epsilon"], rel=1e-5)


def test_answers_are_those_of_the_accountants_and_refusals_carry_the_reason() -> None:
    row = accountants.row(accountants.Setting("three", Laplace(5.0), 3))
    assert row["answers"]["rdp"]["epsilon"] == upper_bound("rdp", ((Laplace(5.0), 3),), accountants.DELTA)
    assert row["answers"]["rdp"]["seconds"] > 0
    assert "got Laplace" in row["answers"]["gdp"]["refused"]
    assert accountants.row(accountants.Setting("open", NonPrivate(), 1))["answers"]["rdp"] == {
        "refused": "its epsilon is infinite."
    }


def test_the_page_rounds_up_numbers_refusals_once_and_shows_a_negative_saving() -> None:
    answers = {
        "gdp": {"refused": "accountant 'gdp' has no valid bound for X: not plain."},
        "rdp": {"epsilon": 1.0, "seconds": 0.5},
        "pld": {"epsilon": 1.250001, "seconds": 2.0},
        "prv": {"refused": "too wide."},
    }
    row = {"name": "two", "event": Gaussian(1.0).to_json(), "count": 2, "answers": answers}
    record = {"delta": 1e-5, "command": "python -m x", "time": "2026", "commit": None, "dirty": None, "threads": "1"}
    record |= {"machine": {"cpu": "c", "cores": 2, "memory_gib": 8.0, "os": "o", "load_average_1min": 0.1}}
    record |= {"versions": {"scipy": "1"}, "rows": [row, row]}
    text = accountants.page(record)
    assert text.count("| two | 2 | [1] | 1 | 1.2501 | [2] | -25.0% | –, 0.50, 2.00, – |") == 2
    assert text.count("- [1] gdp: not plain.") == 1
    assert text.count("- [2] prv: too wide.") == 1


def test_a_file_without_records_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected at least one record"):
        accountants.newest(tmp_path / "empty.jsonl")


def test_no_setting_finds_anothers_work_in_a_cache() -> None:
    assert len({setting.event for setting in accountants.SETTINGS}) == len(accountants.SETTINGS) >= 20
