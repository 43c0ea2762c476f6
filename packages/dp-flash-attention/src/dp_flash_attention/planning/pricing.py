"""One event, asked of every accountant, with word of which one is at work."""

from __future__ import annotations

from collections.abc import Callable

from dpfa_core.errors import DPFAError, UnsupportedEvent
from dpfa_core.events import Event
from dpfa_core.spending import Spending, first_party_accountants, remarks, upper_bound

Say = Callable[[str], None]
"""Told in a few words what is computed next."""


def nobody(text: str) -> None:
    """A `Say` that nobody listens to."""


def priced_by_all(event: Event, count: int, delta: float, say: Say = nobody) -> Spending:
    """Epsilon of `count` times `event` at `delta` by every accountant, or its reason.

    Guarantee: assumed (each accountant's bound has its own).
    Raises: UnsupportedEvent if none has a bound.
    """
    values, reasons = [], []
    for name in first_party_accountants():
        say(f"epsilon by {name}")
        try:
            values.append((name, upper_bound(name, ((event, count),), delta)))
        except DPFAError as error:
            reasons.append((name, str(error)))
    if not values:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        raise UnsupportedEvent(f"no installed accountant can price {event!r} at {delta=}: {listed}")
    loose = tuple((name, remark) for name, _ in values for remark in remarks(name, ((event, count),)))
    return Spending(min(value for _, value in values), delta, tuple(values), tuple(reasons), loose)
