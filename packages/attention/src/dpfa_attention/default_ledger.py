"""Where a call is recorded: the ledger it names, or the process's own."""

from __future__ import annotations

from dpfa_core.checks import require
from dpfa_core.errors import LedgerError
from dpfa_core.ledger import Ledger
from dpfa_core.spec import PrivacySpec, Relation, Unit

_ledgers: dict[tuple[Unit, Relation], Ledger] = {}


def process_ledger(unit: Unit, relation: Relation = "replace") -> Ledger:
    """The ledger in memory of all calls of this process that protect `unit` and give no ledger.

    One for each unit and relation, because only guarantees of the same kind compose. It has no budget and
    ends with the process; ``Ledger.open`` makes one that lasts. A forked child cannot use its parent's.

    Guarantee: tested.
    Returns: the same object each time; ``process_ledger("sequence").spent(1e-5)`` is what was spent.
    Raises: PrivacyParameterError for an unknown unit or relation.
    """
    if (unit, relation) not in _ledgers:
        # setdefault: of two threads that get here at once, both use the same one
        _ledgers.setdefault((unit, relation), Ledger.memory(unit=unit, relation=relation))
    return _ledgers[unit, relation]


def number_and_delta(ledger: Ledger | None) -> tuple[int, float]:
    """What a graph keeps of a ledger; 0 stands for the process's own."""
    if ledger is None:
        return 0, 0.0
    require(
        isinstance(ledger, Ledger),
        "ledger must be None or a dpfa_core.ledger.Ledger",
        ledger,
        "A file is opened by Ledger.open(path, unit=..., relation=..., delta=...).",
    )
    return ledger.number, ledger.delta or 0.0


def ledger_numbered(number: int, spec: PrivacySpec) -> Ledger:
    """The ledger to charge; it must be kept for the records that `spec` protects.

    Raises: LedgerError if it is not, or is gone.
    """
    if number == 0:
        return process_ledger(spec.unit, spec.relation)
    ledger = Ledger.numbered(number)
    for term in ("unit", "relation"):
        kept, asked = getattr(ledger, term), getattr(spec, term)
        if kept not in (None, asked):
            raise LedgerError(
                f"this call needs a ledger kept for {term}={asked!r}, got one for {kept!r}; "
                "open another ledger, or ask for the promise that this one keeps."
            )
    return ledger
