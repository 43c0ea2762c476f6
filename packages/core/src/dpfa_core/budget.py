"""The limit of a ledger: whether what is about to be recorded fits below an epsilon, and how much more would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, Context, Decimal

from dpfa_core.errors import BudgetExhausted, DPFAError
from dpfa_core.events import Event
from dpfa_core.spending import admitting, shows, spending, upper_bound, within

Spent = tuple[tuple[Event, int], ...]
"""Events and how often they were released."""

Read = Callable[[], Iterable[tuple[Event, int]]]
"""Reads what was spent; asked only where something has to be priced."""


class Budget:
    """At most `epsilon` at `delta`.

    Pricing is slow and equal events come in long runs: what was found to fit is remembered together with the last
    line of the ledger, and another writer's line voids it. The ledger holds its lock meanwhile.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self.epsilon, self.delta = epsilon, delta
        self._cleared: tuple[int, Event, int] | None = None  # (last line, event, how many more fit)
        self._latest: Event | None = None  # what was priced last: a second one of its kind begins a run

    def admit(self, event: Event, count: int, last: int, read: Read) -> None:
        """`count` of `event` are about to become the line after `last`; inside of ``explained``."""
        if self._cleared is not None and self._cleared[:2] == (last, event) and self._cleared[2] >= count:
            self._cleared = (last + 1, event, self._cleared[2] - count)
            return
        spent, run, ahead = tuple(read()), self._latest == event, 1
        accountant = self._admitting(spent, event, count)
        if run:
            # Look ahead in powers of two, so that a run of T releases is priced about log T times. Who admitted is
            # asked alone: another accountant's bound may be a little lower, and takes seconds each time.
            while ahead < 2**20 and shows(accountant, (*spent, (event, count + ahead)), self.delta, self.epsilon):
                ahead *= 2
        self._cleared, self._latest = (last + 1, event, ahead // 2), event

    def foresee(self, event: Event, count: int, last: int, read: Read) -> None:
        """Lines after `last` will be `count` of `event`; inside of ``explained``."""
        self._admitting(tuple(read()), event, count)
        self._cleared = (last, event, count)

    def forget(self) -> None:
        """A line was not written: nothing is known of what follows."""
        self._cleared = None

    @contextmanager
    def explained(self, event: Event, count: int) -> Iterator[None]:
        """Turn a refusal inside into ``BudgetExhausted``, which says how many more would fit."""
        try:
            yield
        except _OverBudgetError as refusal:
            fits = self._largest_that_fits(refusal.spent, event, count)
            raise BudgetExhausted(
                f"the budget is epsilon={self.epsilon} at delta={self.delta}; {count} more of {event} would exceed it: "
                f"{_so_far(refusal.spent, self.delta)} is spent and {fits} more would fit. Nothing was released or "
                "recorded; stop here, or open a ledger for other records."
            ) from None

    def _admitting(self, spent: Spent, event: Event, count: int) -> str:
        """The accountant that shows `count` more of `event` to fit."""
        accountant = admitting((*spent, (event, count)), self.delta, self.epsilon)
        if accountant is None:
            raise _OverBudgetError(spent)
        return accountant

    def _largest_that_fits(self, spent: Spent, event: Event, count: int) -> int:
        """How many of `event`, fewer than `count`, some accountant shows to fit."""
        try:
            prices = spending((*spent, (event, count)), self.delta).by_accountant
        except DPFAError:
            return 0
        tightest, _ = min(prices, key=lambda price: price[1])

        def fits_by_the_tightest(more: int) -> bool:
            try:
                return upper_bound(tightest, (*spent, (event, more)), self.delta) <= self.epsilon
            except DPFAError:
                return False

        def fits_by_any(more: int) -> bool:
            return within((*spent, (event, more)), self.delta, self.epsilon)

        # One accountant leads nearly to the answer; asking all of them takes seconds each time.
        least = _bisect(fits_by_the_tightest, 0, count)
        return _bisect(fits_by_any, least, count) if least + 1 < count and fits_by_any(least + 1) else least


class _OverBudgetError(Exception):
    """What was asked for does not fit; ``spent`` is what had been released when it was asked."""

    def __init__(self, spent: Spent) -> None:
        super().__init__()
        self.spent = spent


def _bisect(good: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _so_far(spent: Spent, delta: float) -> str:
    try:
        epsilon = Decimal(spending(spent, delta).epsilon)
    except DPFAError:
        return "what no accountant can price"
    return f"epsilon={epsilon.normalize(Context(prec=6, rounding=ROUND_CEILING)):f}"
