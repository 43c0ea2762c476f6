"""The ledger within one process: durable settings, append-only, terms, budget, reservations."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpfa_core import spending
from dpfa_core.errors import BudgetExhausted, LedgerError, PluginError, PrivacyParameterError
from dpfa_core.events import Gaussian, Laplace, NonPrivate, PoissonSampled, SelfComposed
from dpfa_core.ledger import Ledger

TERMS: dict[str, Any] = {"unit": "example", "relation": "add_or_remove", "delta": 1e-5}
LINE: dict[str, str] = {"purpose": "training", "mechanism": "gaussian", "backend": "torch"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spent.ledger"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path, **TERMS) as opened:
        yield opened


def lines(ledger: Ledger) -> list[tuple[Any, int]]:
    return [(release.event, release.count) for release in ledger.releases()]


def test_what_was_recorded_is_there_after_reopening(path: Path, ledger: Ledger) -> None:
    first = ledger.record(Gaussian(1.0), **LINE)
    second = ledger.record(PoissonSampled(0.01, Gaussian(2.0)), **LINE, count=3)
    ledger.close()
    for again in (Ledger.open(path, **TERMS), Ledger.read(path)):
        with again:
            assert [release.id for release in again.releases()] == [first, second]
            assert lines(again) == [(Gaussian(1.0), 1), (PoissonSampled(0.01, Gaussian(2.0)), 3)]
            assert (again.unit, again.relation, again.delta, again.budget) == (*TERMS.values(), None)


def test_wal_and_full_synchronisation_are_really_set(path: Path, ledger: Ledger) -> None:
    connection = ledger._connection()
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert path.with_name(path.name + "-wal").is_file()


def test_equal_events_are_counted_together_in_order_of_appearance() -> None:
    ledger = Ledger.memory()
    for multiplier in (2.0, 1.0, 2.0):
        ledger.record(Gaussian(multiplier), **LINE, count=2)
    assert list(ledger.events()) == [(Gaussian(2.0), 4), (Gaussian(1.0), 2)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE releases SET count = 1",
        "DELETE FROM releases",
        "UPDATE terms SET value = '9' WHERE name = 'budget'",
        "DELETE FROM terms",
        "INSERT OR REPLACE INTO terms VALUES ('budget', '9')",
        "INSERT OR REPLACE INTO releases SELECT sequence, id, recorded_at, purpose, mechanism, backend, event, 1, "
        "versions FROM releases",
        "INSERT OR REPLACE INTO releases SELECT NULL, id, recorded_at, purpose, mechanism, backend, event, 1, "
        "versions FROM releases",
        "REPLACE INTO releases SELECT 1, 'another', recorded_at, purpose, mechanism, backend, event, 1, versions "
        "FROM releases",
    ],
)
def test_lines_and_terms_can_only_be_appended(path: Path, ledger: Ledger, statement: str) -> None:
    ledger.record(Gaussian(1.0), **LINE, count=5)
    with sqlite3.connect(path) as other, pytest.raises(sqlite3.DatabaseError, match="append-only"):
        other.execute(statement)
    other.close()
    assert lines(ledger) == [(Gaussian(1.0), 5)]


def test_a_ledger_without_the_guard_against_replacement_gets_it_when_opened(path: Path, ledger: Ledger) -> None:
    ledger.record(Gaussian(1.0), **LINE, count=5)
    ledger.close()
    with sqlite3.connect(path) as other:
        other.execute("DROP TRIGGER releases_once")
    other.close()
    replace = "REPLACE INTO releases SELECT sequence, id, '', '', '', '', event, 1, versions FROM releases"
    with Ledger.open(path, **TERMS) as again:
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            again._connection().execute(replace)
        assert lines(again) == [(Gaussian(1.0), 5)]
        again.record(Gaussian(1.0), **LINE)


@pytest.mark.parametrize("wrong", [{"unit": "user"}, {"relation": "replace"}, {"delta": 1e-6}, {"budget": 3.0}])
def test_other_terms_than_the_files_own_are_refused(path: Path, ledger: Ledger, wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(LedgerError, match=f"was created with {name}=.*, got {value!r}; open it with its own terms"):
        Ledger.open(path, **TERMS | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unit": "person"}, "unit must be one of"),
        ({"relation": "swap"}, "relation must be one of"),
        ({"delta": 1.0}, r"delta must be in \[0, 1\)"),
        ({"budget": 0.0}, "budget must be a finite number > 0, got 0.0. None means that nothing is refused"),
    ],
)
def test_terms_are_checked_before_the_file_is_made(path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        Ledger.open(path, **TERMS | wrong)
    assert not path.exists()


def test_a_budget_needs_its_delta() -> None:
    with pytest.raises(LedgerError, match="a ledger with a budget needs the delta"):
        Ledger.memory(budget=1.0)


def test_a_file_that_cannot_be_a_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text" * 2000)
    for bad in (
        tmp_path / "missing" / "a.ledger",
        tmp_path / "file" / "a.ledger",
        tmp_path,
        tmp_path / "file",
    ):
        with pytest.raises(LedgerError, match=r"must be a writable sqlite file, got .*; check the path and its rights"):
            Ledger.open(bad, **TERMS)
    for bad in (tmp_path / "missing", tmp_path):
        with pytest.raises(LedgerError, match="no such file"):
            Ledger.read(bad)
    with pytest.raises(LedgerError, match="expected a ledger, got"):
        Ledger.read(tmp_path / "file")


def test_a_folder_that_becomes_unwritable_stops_the_release(path: Path, ledger: Ledger) -> None:
    ledger._connection().execute("PRAGMA query_only = 1")
    with pytest.raises(LedgerError, match="cannot be written: attempt to write a readonly database"):
        ledger.record(Gaussian(1.0), **LINE)
    ledger._connection().execute("PRAGMA query_only = 0")
    assert lines(ledger) == []


@pytest.mark.parametrize("name", ["", ":memory:"])
def test_a_durable_ledger_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name:
        with pytest.raises(LedgerError, match=r"must be a writable sqlite file"):
            Ledger.open(name, **TERMS)
        return
    with Ledger.open(name, **TERMS) as ledger:
        ledger.record(Gaussian(1.0), **LINE)
    with Ledger.read(tmp_path / name) as ledger:
        assert len(list(ledger.releases())) == 1


def test_a_closed_ledger_takes_nothing_more(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="was closed; open it again"):
        ledger.record(Gaussian(1.0), **LINE)


def test_a_ledger_of_another_schema_is_refused(path: Path, ledger: Ledger) -> None:
    ledger.close()
    with sqlite3.connect(path) as other:
        other.execute("DROP TRIGGER terms_fixed")
        other.execute("UPDATE terms SET value = '2' WHERE name = 'schema'")
    other.close()
    with pytest.raises(LedgerError, match="expected a ledger of schema 1, got 2"):
        Ledger.open(path, **TERMS)


def test_an_event_sampled_under_another_relation_is_refused(ledger: Ledger) -> None:
    event = SelfComposed(PoissonSampled(0.1, Gaussian(1.0), "replace"), 3)
    with pytest.raises(LedgerError, match="kept for relation='add_or_remove', got an event sampled under 'replace'"):
        ledger.record(event, **LINE)
    assert lines(ledger) == []


@pytest.mark.parametrize("event", [None, 1.0, Gaussian, {"event": "Gaussian", "noise_multiplier": 1.0}])
def test_only_events_are_recorded(ledger: Ledger, event: Any) -> None:
    with pytest.raises(LedgerError, match=r"expected an event of dpfa_core\.events"):
        ledger.record(event, **LINE)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_count_is_a_positive_integer(ledger: Ledger, count: Any) -> None:
    with pytest.raises(PrivacyParameterError, match="count must be an integer >= 1"):
        ledger.record(Gaussian(1.0), **LINE, count=count)


def test_rule_8_mechanism_backend_and_versions_are_written(plugins: Any) -> None:
    plugins.add("acme-noise", "mechanisms", {"gaussian": "x:y"}, version="4.5")
    plugins.add("acme-fast", "backends", {"fast": "x:y"}, version="6.7")
    ledger = Ledger.memory()
    ledger.record(Gaussian(1.0), purpose="release", mechanism="gaussian", backend="fast")
    (release,) = ledger.releases()
    assert (release.purpose, release.mechanism, release.backend) == ("release", "gaussian", "fast")
    assert release.versions == (("acme-fast", "6.7"), ("acme-noise", "4.5"), ("dpfa-core", "0.1.0"))


@pytest.mark.usefixtures("accountant_folder")
def test_a_release_over_the_budget_is_refused_and_not_written(path: Path) -> None:
    with Ledger.open(path, **TERMS, budget=3.0) as ledger:
        ledger.record(Gaussian(1.0), **LINE, count=2)
        with pytest.raises(BudgetExhausted, match=r"the budget is epsilon=3\.0 at delta=1e-05; 2 more of Gaussian"):
            ledger.record(Gaussian(1.0), **LINE, count=2)
        assert lines(ledger) == [(Gaussian(1.0), 2)]
        assert ledger.spent() == 2.0
        ledger.record(Gaussian(1.0), **LINE)
        with pytest.raises(BudgetExhausted):
            ledger.record(Gaussian(1e6), **LINE)
        assert ledger.spent() == 3.0
        assert ledger.spent(1e-6, accountant="gdp") == 3.0


@pytest.mark.usefixtures("accountant_folder")
@pytest.mark.parametrize(("recorded", "asked", "fits"), [(2, 9, 5), (2, 6, 5), (7, 1, 0), (7, 100, 0), (0, 8, 7)])
def test_a_refusal_says_what_is_spent_the_limit_and_how_many_more_would_fit(
    recorded: int, asked: int, fits: int
) -> None:
    ledger = Ledger.memory(delta=1e-5, budget=7.5)
    if recorded:
        ledger.record(Gaussian(1.0), **LINE, count=recorded)
    message = (
        rf"the budget is epsilon=7\.5 at delta=1e-05; {asked} more of Gaussian\(noise_multiplier=1\.0\) would exceed "
        rf"it: epsilon={recorded} is spent and {fits} more would fit\. Nothing was released or recorded"
    )
    for refused in (ledger.record, ledger.reserve):
        with pytest.raises(BudgetExhausted, match=message):
            refused(Gaussian(1.0), count=asked, **LINE)
    with pytest.raises(BudgetExhausted, match=message):
        ledger.foresee(Gaussian(1.0), asked)
    if fits:
        ledger.record(Gaussian(1.0), **LINE, count=fits)
    with pytest.raises(BudgetExhausted, match="and 0 more would fit"):
        ledger.record(Gaussian(1.0), **LINE)


@pytest.mark.usefixtures("accountant_folder")
def test_other_writers_need_not_wait_while_a_refusal_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(path, **TERMS, budget=3.0) as one, Ledger.open(path, **TERMS, budget=3.0) as two:
        monkeypatch.setattr(
            "dpfa_core.budget._so_far", lambda spent, delta: two.record(Gaussian(1.0), **LINE) and "epsilon=0"
        )
        with pytest.raises(BudgetExhausted):
            one.record(Gaussian(1.0), **LINE, count=4)
        assert lines(one) == [(Gaussian(1.0), 1)]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The accountants that are asked for a bound, one by one."""
    asked: list[str] = []
    original = spending.upper_bound

    def counting(name: str, *arguments: Any) -> float:
        asked.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(spending, "upper_bound", counting)
    return asked


@pytest.mark.usefixtures("accountant_folder")
def test_a_long_run_is_priced_rarely_and_ends_exactly_at_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)
    ledger = Ledger.memory(delta=1e-5, budget=1000.0)
    for _ in range(1000):
        ledger.record(Gaussian(1.0), **LINE)
    with pytest.raises(BudgetExhausted):
        ledger.record(Gaussian(1.0), **LINE)
    assert ledger.spent() == 1000.0
    assert len(asked) < 150


@pytest.mark.usefixtures("accountant_folder")
def test_events_that_differ_are_priced_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)
    ledger = Ledger.memory(delta=1e-5, budget=1000.0)
    for number in range(20):
        ledger.record(Gaussian(1.0 + number), **LINE)
    assert len(asked) == 20


PRICED = """
class Book:
    contract_version, name, bound = 1, {name!r}, "upper"
    def __init__(self): self.total = 0.0
    def supports(self, event): return ()
    def compose(self, event, count=1):
        self.total += count * {price} / event.noise_multiplier
        return self
    def epsilon(self, delta): return self.total
    def delta(self, epsilon): return 0.0
    def state(self): return {{}}
    @classmethod
    def from_state(cls, state): return cls()
"""


def test_only_the_accountant_that_admitted_looks_ahead_and_the_budget_is_still_used_up(
    plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = {"gdp": 1.0, "pld": 0.5}
    sources = {f"a_{name}": PRICED.format(name=name, price=price) for name, price in prices.items()}
    plugins.add("dpfa-accounting", "accountants", {name: f"a_{name}:Book" for name in prices}, sources)
    asked = counted(monkeypatch)
    ledger = Ledger.memory(delta=1e-5, budget=100.0)
    for _ in range(100):
        ledger.record(Gaussian(1.0), **LINE)
    # gdp shows these to fit; nobody asks pld, whose bound is lower and whose time is long
    assert asked
    assert set(asked) == {"gdp"}
    for _ in range(100):
        ledger.record(Gaussian(1.0), **LINE)
    assert ledger.spent() == 100.0
    with pytest.raises(BudgetExhausted):
        ledger.record(Gaussian(1.0), **LINE)


@pytest.mark.usefixtures("accountant_folder")
def test_another_writers_line_voids_what_was_cleared(path: Path) -> None:
    with Ledger.open(path, **TERMS, budget=10.0) as one, Ledger.open(path, **TERMS, budget=10.0) as two:
        one.foresee(Gaussian(1.0), 10)
        two.record(Gaussian(1.0), **LINE, count=9)
        one.record(Gaussian(1.0), **LINE)
        for ledger in (one, two):
            with pytest.raises(BudgetExhausted):
                ledger.record(Gaussian(1.0), **LINE)


@pytest.mark.usefixtures("accountant_folder")
def test_foresee_charges_nothing_and_refuses_what_would_not_fit() -> None:
    ledger = Ledger.memory(delta=1e-5, budget=5.0)
    ledger.foresee(Gaussian(1.0), 5)
    assert lines(ledger) == []
    with pytest.raises(BudgetExhausted, match="6 more of"):
        ledger.foresee(Gaussian(1.0), 6)
    for _ in range(5):
        ledger.record(Gaussian(1.0), **LINE)
    with pytest.raises(BudgetExhausted):
        ledger.record(Gaussian(1.0), **LINE)


@pytest.mark.usefixtures("accountant_folder")
def test_what_was_foreseen_clears_that_event_only() -> None:
    ledger = Ledger.memory(delta=1e-5, budget=5.0)
    ledger.foresee(Gaussian(1.0), 5)
    with pytest.raises(BudgetExhausted):
        ledger.record(Gaussian(0.1), **LINE)


@pytest.mark.usefixtures("accountant_folder")
def test_a_failed_write_leaves_nothing_cleared() -> None:
    ledger = Ledger.memory(delta=1e-5, budget=2.0)
    ledger.foresee(Gaussian(1.0), 2)
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.record(Gaussian(1.0), purpose=object(), mechanism="m", backend="b")  # type: ignore[arg-type]
    assert lines(ledger) == []
    ledger.record(Gaussian(1.0), **LINE, count=2)


def test_no_accountant_means_no_budgeted_release(plugins: Any) -> None:
    ledger = Ledger.memory(delta=1e-5, budget=100.0)
    with pytest.raises(PluginError, match="needs an accountant, got none installed"):
        ledger.record(Gaussian(1.0), **LINE)


def test_a_reservation_is_charged_at_once_and_hands_out_its_count() -> None:
    ledger = Ledger.memory()
    reservation = ledger.reserve(Laplace(1.0), 3, **LINE)
    assert lines(ledger) == [(Laplace(1.0), 3)]
    assert [reservation.use() for _ in range(3)] == [f"{reservation.id}/{n}" for n in (1, 2, 3)]
    with pytest.raises(BudgetExhausted, match="holds 3 releases and all are used; reserve more"):
        reservation.use()
    assert lines(ledger) == [(Laplace(1.0), 3)]


@pytest.mark.usefixtures("accountant_folder")
def test_a_reservation_over_the_budget_is_refused() -> None:
    ledger = Ledger.memory(delta=1e-5, budget=2.0)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(Gaussian(1.0), 3, **LINE)
    assert lines(ledger) == []


def test_spending_needs_a_delta() -> None:
    with pytest.raises(LedgerError, match="spending needs a delta, got none"):
        Ledger.memory().spent()


@pytest.mark.parametrize("delta", [2, -1e-5, float("nan"), "1e-5"])
def test_spending_at_a_delta_that_is_none_is_refused_before_anything_is_priced(delta: Any) -> None:
    with pytest.raises(PrivacyParameterError, match=r"delta must be in \[0, 1\)"):
        Ledger.memory().spent(delta)


def test_an_empty_ledger_has_spent_nothing() -> None:
    assert Ledger.memory(delta=1e-5).spent() == 0.0


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    def work() -> None:
        for _ in range(10):
            ledger.record(NonPrivate(), **LINE)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({release.id for release in ledger.releases()}) == 40
