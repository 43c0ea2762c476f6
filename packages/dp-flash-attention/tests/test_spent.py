"""``dpfa spent``: a ledger priced by several accountants side by side, and its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpfa_core.events import BallsInBins, Gaussian, Laplace, PoissonSampled
from dpfa_core.ledger import Ledger
from dpfa_core.spending import upper_bound

LINE = {"purpose": "training", "mechanism": "gaussian", "backend": "torch"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    with Ledger.open(path, unit="example", relation="add_or_remove", delta=1e-5, budget=5.0) as book:
        book.record(Gaussian(4.0), **LINE)
        book.reserve(PoissonSampled(0.1, Gaussian(2.0)), 3, **LINE)
        book.record(Gaussian(4.0), **LINE | {"purpose": "release"})
    return path


def test_a_bound_that_is_known_to_be_loose_says_so(dpfa, path):
    with Ledger.open(path, unit="example", relation="add_or_remove", delta=1e-5) as book:
        book.record(BallsInBins(10, 2, Gaussian(2.0)), **LINE)
    found = dpfa("spent", path, "--json").json
    assert any(line.startswith("pld: BallsInBins") and "without amplification" in line for line in found["remarks"])
    assert not any(line.startswith("rdp") for line in found["remarks"])
    assert found["epsilon"] == found["epsilons"]["rdp"]
    assert "priced without amplification" in dpfa("spent", path).out


def test_accountants_stand_side_by_side_with_values_or_reasons(dpfa, ledger):
    found = dpfa("spent", ledger, "--json").json
    events = ((Gaussian(4.0), 2), (PoissonSampled(0.1, Gaussian(2.0)), 3))
    assert len(found["epsilons"]) >= 2
    for name, value in found["epsilons"].items():
        assert value == upper_bound(name, events, 1e-5)
    assert "gdp" in found["no_bound"]
    assert found["epsilon"] == min(found["epsilons"].values())
    assert (found["budget"], found["remaining"]) == (5.0, 5.0 - found["epsilon"])
    out = dpfa("spent", ledger).out
    rows = {line.split()[0].rstrip(":"): line for line in out.splitlines() if line.strip()}
    for name, value in found["epsilons"].items():
        assert value <= float(rows[name].split()[1]) <= value * 1.001
    assert "no valid bound" in rows["gdp"]
    left = float(out.split("budget 5, ")[1].split()[0])
    assert found["remaining"] * 0.999 <= left <= found["remaining"]
    assert "PoissonSampled(sampling_probability=0.1, event=Gaussian(noise_multiplier=2.0)" in out


def test_remaining_is_told_at_the_budgets_own_delta(dpfa, ledger):
    at_own, at_other = (dpfa("spent", ledger, "--json", *more).json for more in ((), ("--delta", 1e-3)))
    assert at_other["epsilon"] < at_own["epsilon"]
    assert at_other["remaining"] == at_own["remaining"]


def test_jsonl_is_one_line_for_each_line_of_the_ledger(dpfa, ledger):
    done = dpfa("spent", ledger, "--jsonl")
    assert (done.code, done.err) == (0, "")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["event"]["event"], line["count"], line["purpose"]) for line in found] == [
        ("Gaussian", 1, "training"),
        ("PoissonSampled", 3, "training"),
        ("Gaussian", 1, "release"),
    ]
    names = {"id", "time", "purpose", "mechanism", "backend", "versions", "unit", "relation", "event", "count"}
    with Ledger.read(ledger) as book:
        for line, release in zip(found, book.releases(), strict=True):
            assert set(line) == names
            assert (line["id"], line["time"]) == (release.id, release.recorded_at)
            assert (line["unit"], line["relation"]) == ("example", "add_or_remove")
            assert line["versions"] == dict(release.versions) != {}
            assert type(release.event).from_json(line["event"]) == release.event


def test_an_empty_ledger_has_spent_nothing(dpfa, path):
    Ledger.open(path, unit="token", relation="replace", delta=1e-6).close()
    assert dpfa("spent", path, "--json").json["epsilon"] == 0.0
    assert "epsilon = 0.0 at delta = 1e-06; unit token, relation replace, budget none" in dpfa("spent", path).out
    assert dpfa("spent", path, "--jsonl").out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--delta", 0), "delta must be in (0, 1), got 0.0."),
        (("--delta", "nan"), "delta must be in (0, 1), got nan."),
        (("--json", "--jsonl"), "either --json or --jsonl"),
        (("--jsonl", "--delta", 1e-5), "delta must be left out"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(dpfa, path, arguments, message):
    with Ledger.open(path, unit="sequence", relation="replace", delta=1e-5) as book:
        book.record(Laplace(2.0), **LINE)
    done = dpfa("spent", path, *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
