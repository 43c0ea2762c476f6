"""Lines that a ledger must have: what tells an older copy of it from the real one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dpfa_core.errors import LedgerError
from dpfa_core.ledger import Ledger

_LINE = re.compile(r"[0-9a-f]{32}")


class Receipts:
    """A file of ids of a ledger's lines, only ever appended to, by any number of processes.

    An id is random, so a ledger that holds it is the one that was charged, at that time or later.

    Guarantee: tested (older copies and other ledgers are refused).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, memory: str | os.PathLike[str]) -> Receipts:
        """The receipts beside the file of a memory."""
        return cls(Path(f"{os.fspath(memory)}.receipts").absolute())

    def begin(self, ledger: Ledger) -> None:
        """Write down, besides what is there, every line that `ledger` has."""
        known = set(self._lines())
        self._append("".join(f"\n{line.id}\n" for line in ledger.releases() if line.id not in known))

    def add(self, event_id: str) -> None:
        """Write down one line, durably; before that, its answer must not leave."""
        self._append(f"\n{event_id}\n")

    def check(self, ledger: Ledger, *, begun: bool = False) -> None:
        """Raise LedgerError unless `ledger` has every line; with `begun`, the file must be there."""
        if begun and not self.path.is_file():
            raise LedgerError(
                f"expected the receipts of the memory in {str(self.path)!r}, got no such file; without them an older "
                "copy of the ledger would pass."
            )
        held = {line.id for line in ledger.releases()}
        lost = [line for line in self._lines() if line not in held]
        if lost:
            raise LedgerError(
                f"the ledger {ledger.path!r} must hold every answer of this memory, got one that lacks {len(lost)}: it "
                "is an older copy or another ledger, and would spend the budget again; bring back the newest one."
            )

    def _lines(self) -> list[str]:
        # a line that a crash cut short belongs to an answer that never left
        text = self.path.read_text() if self.path.is_file() else ""
        return [line for line in text.split("\n") if _LINE.fullmatch(line)]

    def _append(self, text: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            written = os.write(descriptor, text.encode())
            if written != len(text):
                raise LedgerError(f"the receipts {str(self.path)!r} could not be written; nothing was released.")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
