"""Who else can price a release, found by asking."""

from __future__ import annotations

from dpfa_core.errors import DPFAError
from dpfa_core.events import Event
from dpfa_core.registry import ACCOUNTANTS
from dpfa_core.spending import first_party_accountants


def remedy(event: Event, refused_by: str) -> str:
    """ "use rdp or pld.", from the installed first-party accountants that have a bound for `event`."""
    able = [name for name in first_party_accountants() if name != refused_by and _prices(name, event)]
    if not able:
        return "no installed accountant prices it."
    return f"use {' or '.join(filter(None, (', '.join(able[:-1]), able[-1])))}."


def _prices(name: str, event: Event) -> bool:
    try:
        book = ACCOUNTANTS.create(name)
        # supports() of an accountant of this package would ask the others in turn
        asked = getattr(book, "prices", None)
        return bool(asked(event)) if asked is not None else not book.supports(event)
    except DPFAError:
        return False
