"""What a list of events costs, by every accountant that is installed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpfa_core.errors import DPFAError, PluginError, UnsupportedEvent
from dpfa_core.events import Event
from dpfa_core.registry import ACCOUNTANTS

CHEAPEST_FIRST = ("gdp", "rdp", "pld", "prv", "certified")
"""The order in which first-party accountants are asked."""


@dataclass(frozen=True)
class Spending:
    """``epsilon`` is the least valid upper bound; the others are kept to be compared."""

    epsilon: float
    delta: float
    by_accountant: tuple[tuple[str, float], ...]
    reasons: tuple[tuple[str, str], ...]
    """(accountant, why it has no bound)."""
    remarks: tuple[tuple[str, str], ...] = ()
    """(accountant, in which way its bound is looser than it could be)."""


def first_party_accountants() -> tuple[str, ...]:
    """Names of the usable first-party accountants, cheapest first."""
    names = {entry.name for entry in ACCOUNTANTS.entries() if entry.first_party and not entry.disabled}
    known = [name for name in CHEAPEST_FIRST if name in names]
    return (*known, *sorted(names.difference(known)))


def priced(accountant: str, events: Iterable[tuple[Event, int]]) -> Any:
    """The accountant called `accountant` after all `events`; ``UnsupportedEvent`` if it has no bound."""
    book = ACCOUNTANTS.create(accountant)
    for event, count in events:
        book.compose(event, count)
    return book


def spending(events: Iterable[tuple[Event, int]], delta: float) -> Spending:
    """The least valid upper bound on epsilon at `delta` over the first-party accountants.

    Guarantee: assumed (each accountant's bound is checked by its own obligations).
    Raises: PluginError if no accountant is installed; UnsupportedEvent if none has a bound.
    """
    events = tuple(events)
    if not events:
        return Spending(0.0, delta, (), ())
    names = first_party_accountants()
    if not names:
        raise PluginError("pricing events needs an accountant, got none installed; pip install dpfa-accounting.")
    values, reasons = [], []
    for name in names:
        try:
            values.append((name, upper_bound(name, events, delta)))
        except DPFAError as error:
            reasons.append((name, str(error)))
    if not values:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        raise UnsupportedEvent(f"no installed accountant has a bound for these events at {delta=}: {listed}")
    loose = tuple((name, remark) for name, _ in values for remark in remarks(name, events))
    return Spending(min(value for _, value in values), delta, tuple(values), tuple(reasons), loose)


def remarks(accountant: str, events: Iterable[tuple[Event, int]]) -> tuple[str, ...]:
    """One sentence for each way in which `accountant` knows its bound of `events` to be loose, if it says so at all."""
    ask = getattr(ACCOUNTANTS.create(accountant), "remarks", None)
    if ask is None:
        return ()
    return tuple(dict.fromkeys(str(remark) for event, _ in events for remark in ask(event)))


def admitting(events: Iterable[tuple[Event, int]], delta: float, budget: float) -> str | None:
    """The first accountant, cheapest first, that shows `events` to stay within `budget`; None where none does."""
    events = tuple(events)
    return next((name for name in _accountants() if shows(name, events, delta, budget)), None)


def shows(accountant: str, events: tuple[tuple[Event, int], ...], delta: float, budget: float) -> bool:
    """Whether one accountant shows that `events` stay within `budget`."""
    try:
        return upper_bound(accountant, events, delta) <= budget
    except DPFAError:
        return False


def within(events: Iterable[tuple[Event, int]], delta: float, budget: float) -> bool:
    """Whether some accountant shows that `events` stay within `budget`; stops at the first that does."""
    events = tuple(events)
    return admitting(events, delta, budget) is not None or not events


def _accountants() -> tuple[str, ...]:
    names = first_party_accountants()
    if not names:
        raise PluginError("pricing events needs an accountant, got none installed; pip install dpfa-accounting.")
    return names


def upper_bound(accountant: str, events: tuple[tuple[Event, int], ...], delta: float) -> float:
    """Epsilon at `delta` by one accountant, which must answer with a number."""
    value = float(priced(accountant, events).epsilon(delta))
    if math.isnan(value) or value < 0:
        raise PluginError(f"accountant {accountant!r} must answer with a number >= 0, got {value}; it is not used.")
    return value
