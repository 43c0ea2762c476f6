"""Composition, once for every accountant: what is composed, merged, refused and remembered."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

from dpfa_core.checks import fraction, integer, non_negative, require
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import (
    Composed,
    EpsilonDelta,
    Event,
    FixedSizeSampled,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    SelfComposed,
)
from dpfa_core.spec import CONTRACT_VERSION, Reasons, Relation

Releases = tuple[tuple[Event, int], ...]
"""Different events with their counts, in an order that does not depend on how they came."""


def leaves(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """The releases that `event` stands for: nothing in them is a composition of several."""
    match event:
        case Composed(events):
            for part in events:
                yield from leaves(part, count)
        case SelfComposed(part, times):
            yield from leaves(part, count * times)
        case PoissonSampled(event=inner) | FixedSizeSampled(event=inner):
            # what one sample answers together is one release of it
            joint = _joint(inner)
            yield joint if joint == NonPrivate() else dataclasses.replace(event, event=joint), count
        case _:
            yield event, count


def merged(releases: Iterable[tuple[Event, int]]) -> Releases:
    """The same releases with all Gaussians on the whole data as one, exactly: mu**2 adds up.

    A sample of everybody is no sample.
    """
    rest: Counter[Event] = Counter()
    gaussians: list[tuple[float, int]] = []
    for event, count in releases:
        match _unsampled(event):
            case Gaussian(noise_multiplier):
                gaussians.append((noise_multiplier, count))
            case other:
                rest[other] += count
    if gaussians:
        rest[_together(gaussians)] += 1
    return _ordered(rest)


def _is_slack(event: Event) -> bool:
    """A (0, delta)-private part, such as a sampler's tail: composing it adds its delta, whatever prices the rest."""
    return isinstance(event, EpsilonDelta) and event.epsilon == 0


def _joint(event: Event) -> Event:
    parts = tuple(leaves(event))
    if all(isinstance(part, Gaussian) for part, _ in parts) and parts:
        return _together([(part.noise_multiplier, count) for part, count in parts if isinstance(part, Gaussian)])
    if any(part == NonPrivate() for part, _ in parts):
        return NonPrivate()
    return parts[0][0] if [count for _, count in parts] == [1] else event


def _together(gaussians: list[tuple[float, int]]) -> Gaussian:
    if [count for _, count in gaussians] == [1]:
        return Gaussian(gaussians[0][0])
    # rounded down: less noise than there is
    total = math.fsum(count / multiplier**2 for multiplier, count in gaussians)
    return Gaussian((1.0 - 2.0**-50) / math.sqrt(total))


def _unsampled(event: Event) -> Event:
    match event:
        case PoissonSampled(1, inner, "add_or_remove"):
            return inner
        case FixedSizeSampled(size, population, inner, "replace") if size == population:
            return inner
    return event


def _ordered(counts: Counter[Event]) -> Releases:
    return tuple(sorted(counts.items(), key=lambda item: json.dumps(item[0].to_json(), sort_keys=True)))


def sampling_reasons(event: Event) -> Reasons:
    """Why a sampled event's relation has no bound here; empty if it is not sampled or has one."""
    match event:
        case PoissonSampled(relation="replace"):
            return (
                "Poisson sampling is priced under add_or_remove, got relation='replace'; "
                "doubling the sensitivity is no bound for sampled releases.",
            )
        case FixedSizeSampled(relation="add_or_remove"):
            return (
                "fixed-size sampling is priced under replace, got relation='add_or_remove'; "
                "state replace, or sample by Poisson.",
            )
    return ()


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
            if not isinstance(leaf, NonPrivate) and not _is_slack(leaf):
                reasons += (*sampling_reasons(leaf), *self._against(_unsampled(leaf)))
            stated = relation_of(leaf)
            if relation and stated and stated != relation:
                reasons.append(
                    f"one account holds one neighbouring relation, got {stated} after {relation}; "
                    "keep an account for each relation."
                )
            relation = relation or stated
        return tuple(dict.fromkeys(reasons))

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
        rest, slack = self._priced()
        if slack > delta:
            return math.inf
        if not rest:
            return 0.0
        value = float(self._epsilon(rest, math.nextafter(delta - slack, 0.0) if slack else delta))
        self._number("epsilon", value)
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
        rest, slack = self._priced()
        value = slack + (float(self._delta(rest, epsilon)) if rest else 0.0)
        self._number("delta", value)
        return min(1.0, math.nextafter(value, 1.0)) if value > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """The events as JSON; any accountant that supports them can go on from it."""
        return {"events": [[event.to_json(), count] for event, count in _ordered(self._counts)]}

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

    def _priced(self) -> tuple[Releases, float]:
        """What the accountant prices, and the sum of the deltas that stand alone, rounded up."""
        slacks = [(event, count) for event, count in self._counts.items() if _is_slack(event)]
        rest = merged((event, count) for event, count in self._counts.items() if not _is_slack(event))
        slack = math.fsum(count * event.delta for event, count in slacks if isinstance(event, EpsilonDelta))
        return rest, math.nextafter(slack * (1.0 + 2.0**-50), 1.0) if slack else 0.0

    def _number(self, quantity: str, value: float) -> None:
        if math.isnan(value) or value < 0:
            raise UnsupportedEvent(
                f"accountant {self.name!r} must answer {quantity} with a number >= 0, got {value}; use another one."
            )

    @abstractmethod
    def _against(self, event: Event) -> Reasons:
        """Reasons against one release that is neither a composition nor NonPrivate."""

    @abstractmethod
    def _epsilon(self, releases: Releases, delta: float) -> float: ...

    @abstractmethod
    def _delta(self, releases: Releases, epsilon: float) -> float: ...
