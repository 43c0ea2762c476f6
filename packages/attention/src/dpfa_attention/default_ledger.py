"""Where a call is recorded that names no ledger."""

from __future__ import annotations

from dpfa_core.ledger import Ledger
from dpfa_core.spec import Relation, Unit

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
