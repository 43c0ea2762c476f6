"""What a ledger holds: its price by every accountant, and its lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dp_flash_attention.planning.pricing import Say, nobody
from dpfa_core.checks import fraction
from dpfa_core.ledger import Ledger
from dpfa_core.spending import spending


def account(path: Path, delta: float | None = None, say: Say = nobody) -> dict[str, Any]:
    """The price of all releases at `delta`, by default the ledger's own, as JSON.

    Returns: among others "epsilon" (least valid bound), "epsilons" and "no_bound" by accountant, and "remaining",
    the budget less epsilon at the budget's own delta, never below 0; None without a budget.
    Raises: LedgerError without a ledger at `path`; UnsupportedEvent if no accountant can price it.
    """
    with Ledger.read(path) as book:
        chosen = book.delta if delta is None else delta
        fraction("delta", chosen, zero=False, remedy="Pass --delta.")
        assert chosen is not None  # noqa: S101  (fraction refuses None)
        events = tuple(book.events())
        say("epsilon by every accountant")
        total = spending(events, chosen)
        remaining = None
        if book.budget is not None:
            at_budget = total.epsilon if chosen == book.delta else book.spent()
            remaining = max(0.0, book.budget - at_budget)
        return {
            "epsilon": total.epsilon,
            "delta": chosen,
            "epsilons": dict(total.by_accountant),
            "no_bound": dict(total.reasons),
            "remarks": [f"{name}: {remark}" for name, remark in total.remarks],
            "events": [{"event": event.to_json(), "count": count} for event, count in events],
            "unit": book.unit,
            "relation": book.relation,
            "budget": book.budget,
            "remaining": remaining,
        }


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Each line of the ledger as JSON, oldest first.

    Raises: LedgerError without a ledger at `path`.
    """
    with Ledger.read(path) as book:
        for release in book.releases():
            yield {
                "id": release.id,
                "time": release.recorded_at,
                "purpose": release.purpose,
                "mechanism": release.mechanism,
                "backend": release.backend,
                "versions": dict(release.versions),
                "unit": book.unit,
                "relation": book.relation,
                "event": release.event.to_json(),
                "count": release.count,
            }
