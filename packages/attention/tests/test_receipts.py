from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dpfa_attention.receipts import Receipts
from dpfa_core.errors import LedgerError
from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger


def charge(ledger: Ledger) -> str:
    return ledger.record(Gaussian(2.0), purpose="release", mechanism="gaussian", backend="torch")


def test_receipts_begin_with_every_line_and_hold_each_once(tmp_path: Path) -> None:
    ledger = Ledger.memory()
    receipts = Receipts.of(tmp_path / "memory")
    ids = [charge(ledger) for _ in range(3)]
    receipts.begin(ledger)
    receipts.begin(ledger)
    assert receipts._lines() == ids
    receipts.check(ledger, begun=True)


def test_a_line_that_the_ledger_lacks_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.memory()
    receipts = Receipts.of(tmp_path / "memory")
    receipts.check(ledger)
    with pytest.raises(LedgerError, match="no such file"):
        receipts.check(ledger, begun=True)
    receipts.add(charge(ledger))
    receipts.check(ledger)
    receipts.add("0" * 32)
    with pytest.raises(LedgerError, match="got one that lacks 1"):
        receipts.check(ledger)


def test_two_processes_leave_a_receipt_of_every_line(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "ledger", unit="token", relation="replace", delta=1e-5).close()
    script = f"""
import sys
from dpfa_attention.receipts import Receipts
from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger
ledger = Ledger.read({str(tmp_path / "ledger")!r})
receipts = Receipts.of({str(tmp_path / "memory")!r})
print(flush=True)
sys.stdin.readline()
for _ in range(20):
    receipts.add(ledger.record(Gaussian(2.0), purpose="release", mechanism="gaussian", backend="torch"))
assert "torch" not in sys.modules
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for each in running:  # both are ready before either begins
        assert each.stdout is not None
        assert each.stdout.readline() == "\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in running:
        each.communicate()
    assert [each.returncode for each in running] == [0, 0]
    lines = [line.id for line in Ledger.read(tmp_path / "ledger").releases()]
    assert len(lines) == 40
    assert sorted(Receipts.of(tmp_path / "memory")._lines()) == sorted(lines)
