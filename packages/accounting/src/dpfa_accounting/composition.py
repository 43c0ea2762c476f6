"""Composition, once for every accountant: what is composed, merged, refused and remembered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

from dpfa_accounting import truncation
from dpfa_accounting.reduction import Releases, coarser, described, equal, leaves, merged, nested, ordered
from dpfa_accounting.remedy import remedy
from dpfa_core.checks import fraction, integer, non_negative, require
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import EpsilonDelta, Event, NonPrivate, TruncatedPoisson
from dpfa_core.spec import CONTRACT_VERSION, Reasons, Relation

__all__ = ["ComposingAccountant", "Releases", "leaves", "merged", "relation_of"]


class Priced(NamedTuple):
    """What an accountant prices, and what is added to delta: `slack`, and (1 + e**epsilon) times `tail`."""

    releases: Releases
    slack: float
    tail: float


class Plan(NamedTuple):
    """How an accountant prices one event."""

    releases: tuple[tuple[Event, int], ...] = ()
    slack: float = 0.0
    tail: float = 0.0
    remarks: tuple[str, ...] = ()
    reasons: tuple[tuple[Event, str], ...] = ()
    """Why it does not, and for which part."""


def relation_of(event: Event) -> Relation | None:
    """The neighbouring relation that a sampled event states; None for an event that fits both."""
    return getattr(event, "relation", None)


class ComposingAccountant(ABC):
    """What every accountant of this package does alike; a subclass prices releases.

    ``Class()`` is empty and costs nothing. Equal events, repeated or in another order, give equal numbers.
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION
    name: ClassVar[str]
    bound: ClassVar[Literal["exact", "certified", "upper", "interval"]]

    def __init__(self) -> None:
        self._counts: Counter[Event] = Counter()
        self._relation: Relation | None = None

    def supports(self, event: Event) -> Reasons:
        """Reasons against composing `event` now; empty means that there is a valid bound."""
        require(isinstance(event, Event), "an accountant composes events of dpfa_core.events", event)
        reasons: list[str] = []
        relation = self._relation
        for leaf, _ in leaves(event):
            reasons += [f"{reason}; {remedy(part, self.name)}" for part, reason in self._plan(leaf).reasons]
            stated = relation_of(leaf)
            if relation and stated and stated != relation:
                reasons.append(
                    f"one account holds one neighbouring relation, got {stated} after {relation}; "
                    "keep an account for each relation."
                )
            relation = relation or stated
        return tuple(dict.fromkeys(reasons))

    def prices(self, event: Event) -> bool:
        """Whether this kind of accountant has a bound for `event`, whatever it holds already."""
        return not any(self._plan(leaf).reasons for leaf, _ in leaves(event))

    def remarks(self, event: Event) -> tuple[str, ...]:
        """One sentence for each way in which the bound for `event` is known to be looser than it could be."""
        found = [remark for leaf, _ in leaves(event) for remark in self._plan(leaf).remarks]
        return tuple(dict.fromkeys(found))

    def compose(self, event: Event, count: int = 1) -> Self:
        """Add `event` `count` times.

        Raises: UnsupportedEvent with the event and every reason; nothing is added then.
        """
        integer("count", count, least=1)
        reasons = self.supports(event)
        if reasons:
            raise UnsupportedEvent(
                f"accountant {self.name!r} has no valid bound for {type(event).__name__}: " + " ".join(reasons)
            )
        for leaf, times in leaves(event, count):
            self._counts[leaf] += times
            self._relation = self._relation or relation_of(leaf)
        return self

    def epsilon(self, delta: float) -> float:
        """An upper bound on epsilon at `delta`, rounded up; infinite where nothing is private.

        Args: 0 <= delta < 1.
        Raises: PrivacyParameterError; UnsupportedEvent where this accountant cannot answer truly.
        """
        fraction("delta", delta)
        if not self._counts:
            return 0.0
        if NonPrivate() in self._counts:
            return math.inf
        rest, slack, tail = self._priced()
        if slack > delta or NonPrivate() in dict(rest):
            return math.inf
        left = math.nextafter(delta - slack, 0.0) if slack else delta
        if not rest and not tail:
            return 0.0
        value = truncation.epsilon(lambda d: self._least(rest, d), left, tail) if tail else self._least(rest, left)
        return math.nextafter(value, math.inf) if value > 0 else 0.0

    def delta(self, epsilon: float) -> float:
        """An upper bound on delta at `epsilon`, rounded up; 1 where nothing is private.

        Args: epsilon >= 0 and finite.
        """
        non_negative("epsilon", epsilon)
        if not self._counts:
            return 0.0
        if NonPrivate() in self._counts:
            return 1.0
        rest, slack, tail = self._priced()
        if NonPrivate() in dict(rest):
            return 1.0

        def plain(epsilon: float) -> float:
            return slack + (self._number("delta", self._delta, rest, epsilon) if rest else 0.0)

        value = truncation.delta(plain, epsilon, tail) if tail else plain(epsilon)
        return min(1.0, math.nextafter(value, 1.0)) if value > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """The events as JSON; any accountant that supports them can go on from it."""
        return {"events": [[event.to_json(), count] for event, count in ordered(self._counts)]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A new accountant with the events of ``state()``.

        Raises: PrivacyParameterError if `state` is not one; UnsupportedEvent for events of another kind.
        """
        rows = state.get("events") if isinstance(state, dict) else None
        pairs = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)
        require(pairs, 'a state must be {"events": [[event, count], ...]}', state)
        accountant = cls()
        for data, count in rows or ():
            accountant.compose(Event.from_json(data), count)
        return accountant

    def _priced(self) -> Priced:
        """What the accountant prices, and what is added to delta, rounded up."""
        releases: Counter[Event] = Counter()
        slacks, tails = [0.0], [0.0]
        for leaf, times in self._counts.items():
            plan = self._plan(leaf)
            slacks.append(times * plan.slack)
            tails.append(times * plan.tail)
            for event, count in plan.releases:
                releases[event] += times * count
        slack, tail = (min(1.0, math.fsum(found) * (1.0 + 2.0**-50)) for found in (slacks, tails))
        return Priced(merged(releases.items()), math.nextafter(slack, 1.0) if slack else 0.0, tail)

    def _plan(self, leaf: Event) -> Plan:
        """How this accountant prices a release that is no composition."""
        try:
            return _sum_of([self._plan_of_equal(event, count) for event, count in equal(leaf)])
        except ArithmeticError as error:
            return Plan(reasons=((leaf, f"{described(leaf)} leaves the range of float64 ({error})"),))

    def _plan_of_equal(self, event: Event, count: int) -> Plan:
        if isinstance(event, NonPrivate):
            return Plan(((event, count),))
        if isinstance(event, EpsilonDelta) and event.epsilon == 0:
            # composing a (0, delta)-private part, such as a sampler's tail, adds its delta, whatever prices the rest
            return Plan(slack=event.delta * count)
        inside = nested(event)
        if inside:
            return Plan(reasons=((event, inside),))
        if isinstance(event, TruncatedPoisson):
            plain = self._plan(truncation.plain(event))
            remark = "TruncatedPoisson is priced as plain sampling, with the chance of a cut added to delta."
            cut = Plan(tail=truncation.overflow(event), remarks=(remark,))
            return plain if plain.reasons else _times(_sum_of([plain, cut]), count)
        against = self._against(event)
        if not against:
            return Plan(((event, count),), remarks=self._remarks(event))
        # an exact accountant does not price what it could only bound
        bound = coarser(event) if self.bound != "exact" else None
        if bound is None:
            return Plan(reasons=((event, against),))
        plan = _sum_of([self._scaled(part, times) for part, times in bound.releases])
        if plan.reasons:
            return Plan(reasons=((event, against),))
        return _times(plan._replace(slack=plan.slack + bound.slack, remarks=(bound.remark, *plan.remarks)), count)

    def _scaled(self, event: Event, count: int) -> Plan:
        return _times(self._plan(event), count)

    def _least(self, releases: Releases, delta: float) -> float:
        return self._number("epsilon", self._epsilon, releases, delta) if releases else 0.0

    def _number(
        self, quantity: str, ask: Callable[[Releases, float], float], releases: Releases, argument: float
    ) -> float:
        """The answer, which must be a number >= 0."""
        try:
            value = float(ask(releases, argument))
        except ArithmeticError as error:
            raise UnsupportedEvent(
                f"accountant {self.name!r} must find {quantity} within the range of float64, got {error}; "
                "use another one."
            ) from error
        if math.isnan(value) or value < 0:
            raise UnsupportedEvent(
                f"accountant {self.name!r} must answer {quantity} with a number >= 0, got {value}; use another one."
            )
        return value

    def _remarks(self, event: Event) -> tuple[str, ...]:
        """How the bound for a release that this accountant prices itself is loose."""
        return ()

    @abstractmethod
    def _against(self, event: Event) -> str:
        """Why one release, neither a composition nor NonPrivate, has no price here; empty if it has one."""

    @abstractmethod
    def _epsilon(self, releases: Releases, delta: float) -> float: ...

    @abstractmethod
    def _delta(self, releases: Releases, epsilon: float) -> float: ...


def _sum_of(plans: list[Plan]) -> Plan:
    return Plan(
        tuple(release for plan in plans for release in plan.releases),
        math.fsum(plan.slack for plan in plans),
        math.fsum(plan.tail for plan in plans),
        tuple(dict.fromkeys(remark for plan in plans for remark in plan.remarks)),
        tuple(reason for plan in plans for reason in plan.reasons),
    )


def _times(plan: Plan, count: int) -> Plan:
    return plan._replace(
        releases=tuple((event, count * times) for event, times in plan.releases),
        slack=plan.slack * count,
        tail=plan.tail * count,
    )
