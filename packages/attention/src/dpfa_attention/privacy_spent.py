"""What the calls of one module cost together."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dpfa_attention.default_ledger import process_ledger
from dpfa_core.checks import require
from dpfa_core.errors import LedgerError
from dpfa_core.events import Event
from dpfa_core.ledger import Ledger
from dpfa_core.spec import Relation, Unit
from dpfa_core.spending import spending, upper_bound


class PrivacySpent(dict[str, Any]):
    """A report of spending: a dictionary, and ``float()`` of it is `total_epsilon`.

    | key | meaning |
    |---|---|
    | total_epsilon, total_delta | what all calls of the period cost together, an upper bound |
    | lifetime_epsilon | the same over all periods |
    | ledger_epsilon | everything in the ledger: what a record loses that meets all its calls, of all modules |
    | privacy_mechanism, composition_method | whose noise; the accountant with the least valid bound, or "none" |
    | forward_count | calls of the period |
    | unit, relation | what the guarantee is about |
    | event_id | the ledger's line of the last call, or None |
    """

    @property
    def event_id(self) -> str | None:
        """The ledger's line of the last call."""
        found: str | None = self["event_id"]
        return found

    def __float__(self) -> float:
        return float(self["total_epsilon"])


class Calls:
    """The lines of a ledger that one module wrote, in periods.

    A copied module starts with no calls, and is charged to the same ledger.
    """

    def __init__(self, ledger: Ledger | None, unit: Unit, relation: Relation) -> None:
        self.given, self.unit, self.relation = ledger, unit, relation
        self.periods: list[list[str]] = [[]]
        self.reasons: list[str] = []
        """Why each period but the first was opened."""
        self.beside: set[str] = set()
        """Lines that are no forward pass."""

    @property
    def ledger(self) -> Ledger:
        """Where the calls are charged."""
        return process_ledger(self.unit, self.relation) if self.given is None else self.given

    def add(self, event_id: str) -> None:
        """Note a call that the ledger has on this line."""
        self.periods[-1].append(event_id)

    def add_beside(self, event_id: str) -> None:
        """Note a line that a call needed beside its release."""
        self.add(event_id)
        self.beside.add(event_id)

    def new_period(self, reason: str) -> None:
        """Count from zero again; the ledger and the lifetime total go on."""
        require(
            isinstance(reason, str) and bool(reason.strip()),
            "reason must say why spending is counted anew",
            reason,
            'For other records: reason="new records".',
        )
        self.periods.append([])
        self.reasons.append(reason)

    def spent(self, delta: float, mechanism: str, accountant: str | None) -> PrivacySpent:
        """The report at `delta`, by `accountant` or the one with the least bound."""
        wanted = {event_id: place for place, period in enumerate(self.periods) for event_id in period}
        lifetime: list[tuple[Event, int]] = []
        period: list[tuple[Event, int]] = []
        last: str | None = None
        forwards = 0
        # what the ledger does not hold was not released: a check of release paths charges another one
        for line in self.ledger.releases() if wanted else ():
            if line.id in wanted:
                lifetime.append((line.event, line.count))
                if wanted[line.id] == len(self.periods) - 1:
                    period.append((line.event, line.count))
                    if line.id not in self.beside:
                        last, forwards = line.id, forwards + 1
        epsilon, method = _price(period, delta, accountant)
        return PrivacySpent(
            total_epsilon=epsilon,
            total_delta=delta,
            lifetime_epsilon=_price(lifetime, delta, accountant)[0],
            ledger_epsilon=_price(list(self.ledger.events()), delta, None)[0],
            privacy_mechanism=mechanism,
            composition_method=method,
            forward_count=forwards,
            unit=self.unit,
            relation=self.relation,
            event_id=last,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        # a connection to a ledger has no copy; what was spent was spent by the original
        return Calls(self.given, self.unit, self.relation)

    def __reduce__(self) -> Any:
        if self.given is not None:
            raise LedgerError(
                "a module with its own ledger cannot be pickled, what it spends next would be charged nowhere; save "
                "its state_dict() and build it again with the ledger."
            )
        return Calls, (None, self.unit, self.relation)


def _price(events: list[tuple[Event, int]], delta: float, accountant: str | None) -> tuple[float, str]:
    if not events:
        return 0.0, "none"
    together: dict[Event, int] = {}
    for event, count in events:
        together[event] = together.get(event, 0) + count
    return _price_of(tuple(together.items()), delta, accountant)


@lru_cache(maxsize=64)
def _price_of(found: tuple[tuple[Event, int], ...], delta: float, accountant: str | None) -> tuple[float, str]:
    # a report asks three times, often about the same events
    if accountant is not None:
        return upper_bound(accountant, found, delta), accountant
    price = spending(found, delta)
    return price.epsilon, min(price.by_accountant, key=lambda bound: bound[1])[0]
