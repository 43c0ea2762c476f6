"""The ledger between processes: a shared budget, sudden death, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpfa_core
from dpfa_core.errors import LedgerError
from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger

TERMS: dict[str, Any] = {"unit": "example", "relation": "replace", "delta": 1e-5}
LINE: dict[str, str] = {"purpose": "release", "mechanism": "gaussian", "backend": "torch"}

PROLOGUE = """
import sys, time
from dpfa_core.errors import BudgetExhausted
from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger
path, start = sys.argv[1], float(sys.argv[2])
terms = dict(unit="example", relation="replace", delta=1e-5)
line = dict(purpose="release", mechanism="gaussian", backend="torch")
while time.time() < start: pass
"""

BUDGETED = """
ledger = Ledger.open(path, **terms, budget=50.0)
accepted = 0
for _ in range(25):
    try:
        ledger.record(Gaussian(1.0), **line)
        accepted += 1
    except BudgetExhausted:
        pass
print(accepted)
"""

ENDLESS = """
ledger = Ledger.open(path, **terms)
while True:
    print(ledger.record(Gaussian(1.0), **line), flush=True)
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spent.ledger"


@pytest.fixture
def start(tmp_path: Path, path: Path) -> Start:
    """Starts a script in an interpreter that sees dpfa_core and the plugin folder alone."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "dpfa_core").symlink_to(Path(dpfa_core.__file__).parent)
    folders = os.pathsep.join([str(library), str(tmp_path / "site")])
    moment = time.time() + 0.7

    def begin(script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", PROLOGUE + script, str(path), str(moment)],
            env={**os.environ, "PYTHONPATH": folders},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.mark.usefixtures("accountant_folder")
def test_processes_that_share_a_budget_are_granted_exactly_what_it_allows(path: Path, start: Start) -> None:
    # All four also create the file at the same moment.
    results = [process.communicate(timeout=60) for process in [start(BUDGETED) for _ in range(4)]]
    assert [error for _, error in results] == [""] * 4
    assert sum(int(out) for out, _ in results) == 50
    with Ledger.read(path) as ledger:
        assert len(list(ledger.releases())) == 50
        assert ledger.spent() == 50.0


def test_a_killed_writer_loses_nothing_that_it_was_told_is_recorded(path: Path, start: Start) -> None:
    writers = [start(ENDLESS) for _ in range(2)]
    told: set[str] = set()
    for writer in writers:
        assert writer.stdout is not None
        told |= {writer.stdout.readline().strip() for _ in range(10)}
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        # A line that the kill cut short was not handed out.
        assert writer.stdout is not None
        told |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        assert writer.wait() == -signal.SIGKILL
    with Ledger.open(path, **TERMS) as ledger:
        recorded = {release.id for release in ledger.releases()}
        assert told <= recorded
        assert len(told) >= 20
        ledger.record(Gaussian(1.0), **LINE)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child: 0 if `work` came through."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
def test_a_forked_child_keeps_its_lines_when_the_parent_closes_first(path: Path) -> None:
    ledger = Ledger.open(path, **TERMS)
    ledger.record(Gaussian(1.0), **LINE)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.record(Gaussian(2.0), **LINE)
            os.write(ready[1], b".")
            os.read(go[0], 1)
            for _ in range(3):
                ledger.record(Gaussian(3.0), **LINE)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.read(ready[0], 1)
    ledger.record(Gaussian(4.0), **LINE)
    ledger.close()
    os.write(go[1], b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (*ready, *go):
        os.close(end)
    with Ledger.read(path) as ledger:
        assert dict(ledger.events()) == {
            Gaussian(1.0): 1,
            Gaussian(2.0): 1,
            Gaussian(3.0): 3,
            Gaussian(4.0): 1,
        }


@needs_fork
@pytest.mark.usefixtures("accountant_folder")
def test_parent_and_child_share_the_budget(path: Path) -> None:
    ledger = Ledger.open(path, **TERMS, budget=10.0)
    ledger.foresee(Gaussian(1.0), 10)

    def spend() -> None:
        for _ in range(6):
            ledger.record(Gaussian(1.0), **LINE)

    assert in_child(spend) == 0
    with pytest.raises(Exception, match="the budget is"):
        spend()
    assert ledger.spent() == 10.0
    ledger.close()


@needs_fork
def test_a_ledger_in_memory_is_refused_after_a_fork() -> None:
    ledger = Ledger.memory()
    ledger.record(Gaussian(1.0), **LINE)

    def refused() -> None:
        for use in (lambda: ledger.record(Gaussian(1.0), **LINE), lambda: list(ledger.events())):
            with pytest.raises(LedgerError, match=r"in two places; open a file with Ledger\.open"):
                use()

    assert in_child(refused) == 0
    ledger.record(Gaussian(1.0), **LINE)
    assert list(ledger.events()) == [(Gaussian(1.0), 2)]


@needs_fork
def test_a_reservation_is_refused_after_a_fork() -> None:
    reservation = Ledger.memory().reserve(Gaussian(1.0), 2, **LINE)

    def refused() -> None:
        with pytest.raises(LedgerError, match=r"cannot be used after a fork.*reserve in the new process"):
            reservation.use()

    assert in_child(refused) == 0
    reservation.use()


@needs_fork
def test_a_ledger_deleted_meanwhile_is_not_begun_anew(path: Path) -> None:
    ledger = Ledger.open(path, **TERMS)
    ledger.record(Gaussian(1.0), **LINE)
    assert in_child(path.unlink) == 0
    with pytest.raises(LedgerError, match="unable to open database file"):
        ledger.record(Gaussian(1.0), **LINE)


@needs_fork
def test_a_relative_path_is_fixed_when_the_ledger_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger.open("spent.ledger", **TERMS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert in_child(lambda: ledger.record(Gaussian(1.0), **LINE) and None) == 0
    assert list(ledger.events()) == [(Gaussian(1.0), 1)]
    ledger.close()
