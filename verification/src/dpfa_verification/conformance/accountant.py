"""What an accountant must keep: never below what a release really costs, and composition that adds up."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpmath import mpf

from dpfa_core.contracts import Accountant
from dpfa_core.errors import DPFAError, UnsupportedEvent
from dpfa_core.events import (
    BallsInBins,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    SelfComposed,
)
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, Violated, holds, obligation
from dpfa_verification.truth import profiles
from dpfa_verification.truth.sampled import SAMPLED

# Moderate noise: accountants with a grid take long where the loss spreads wide.
EVENTS: tuple[Event, ...] = (
    Gaussian(10.0),
    PoissonSampled(0.02, Gaussian(3.0)),
    Laplace(3.0),
    EpsilonDelta(0.4, 1e-9),
    PoissonSampled(0.9, Gaussian(2.0)),
    PoissonSampled(0.9, Gaussian(1.0), "replace"),
    FixedSizeSampled(30, 100, Gaussian(3.0)),
    Gaussian(1.0),
    PoissonSampled(0.3, Gaussian(0.7)),
    DiscreteGaussian(2.0),
    RandomizedResponse(0.6, 3),
    Exponential(0.5),
    BallsInBins(4, 1, Gaussian(2.0)),
)

WIDEST = 3.5
"""mu beyond which there is little left to promise: epsilon is about 20 there at delta = 1e-5."""

ROUND_OFF = 1e-9
"""Relative error granted to accountants that do not call themselves exact or certified: float64 sums over
many grid points. The bound is then taken as that much larger."""


@dataclass(frozen=True)
class NeverHeardOf(Event):
    """An event that no accountant can price."""

    secret: float


class AccountantExamination:
    """The obligations of an accountant."""

    def __init__(self, empty: Callable[[], Accountant], level: Level) -> None:
        self.empty, self.level = empty, level
        priced = [event for event in EVENTS if not empty().supports(event)]
        self.known = priced[: level.events]
        # one release is quick to price: from the default level on, each kind that is supported
        self.singly = priced if level.events > 1 else priced[:2]

    def after(self, *events: Event | tuple[Event, int]) -> Accountant:
        """A new account of the events, some with a count."""
        book = self.empty()
        for event in events:
            book.compose(*(event if isinstance(event, tuple) else (event,)))
        return book

    def supported(self, *events: Event) -> list[Event]:
        return [event for event in events if not self.empty().supports(event)]

    def some(self, events: list[Event]) -> list[Event]:
        """`events`, if there are any."""
        if not events:
            raise Undecided("none of the events that could be checked is supported")
        return events

    def of_one_relation(self) -> list[Event]:
        """Events that may stand in one account."""
        return self.some([event for event in self.known if getattr(event, "relation", "") in ("", "add_or_remove")])

    def pairs(self) -> list[tuple[Event, ...]]:
        """Pairs of a few events that may stand in one account."""
        few = self.of_one_relation()[: 1 + self.level.events // 2]
        if len(few) < 2:
            raise Undecided("looked at from the default level on, where two kinds of events are supported")
        return list(itertools.combinations(few, 2))

    def slack(self) -> float:
        return 0.0 if self.empty().bound in ("exact", "certified") else ROUND_OFF

    @obligation("contract", "the plugin contract")
    def contract(self) -> None:
        book = self.empty()
        holds(
            book.bound in ("exact", "certified", "upper", "interval"),
            f"bound must be exact, certified, upper or interval; it is {book.bound!r}",
        )
        for event in EVENTS:
            reasons = book.supports(event)
            good = isinstance(reasons, tuple) and all(isinstance(reason, str) and reason for reason in reasons)
            holds(good, f"supports({event!r}) must return a tuple of sentences, not {reasons!r}")
        for event in self.known[:1]:
            holds(book.compose(event) is book, "compose() must work in place and return the accountant")

    @obligation("empty", "nothing released costs nothing")
    def empty_costs_nothing(self) -> None:
        for value in (self.empty().epsilon(1e-5), self.empty().delta(1.0)):
            holds(value == 0, f"an empty accountant says {value!r}, not 0")

    @obligation("gaussian_exact", "Balle & Wang 2018, Theorem 8; Dong, Roth & Su 2022, Corollary 3.3; 60 digits")
    def gaussian_exact(self) -> None:
        """For compositions of Gaussian releases neither epsilon nor delta is below the exact value."""
        self.some(self.supported(Gaussian(1.0)))
        quick = self.level.events == 1
        multipliers = [1.5] if quick else np.geomspace(12.0, 0.5, self.level.grid).tolist()
        for multiplier, count in itertools.product(multipliers, (1, 30)):
            mu = mpf(count) ** mpf("0.5") / multiplier
            if mu <= WIDEST:
                book = self.after((Gaussian(multiplier), count))
                self._not_below_mu(book, mu, f"{count} times {Gaussian(multiplier)!r}")
        parts = (Gaussian(6.0), (Gaussian(4.0), 7), Composed((Gaussian(6.0), SelfComposed(Gaussian(4.0), 3))))
        mu = (mpf(2) / 36 + mpf(10) / 16) ** mpf("0.5")
        self._not_below_mu(self.after(*parts), mu, f"{parts!r}")

    def _not_below_mu(self, book: Accountant, mu: mpf, what: str) -> None:
        for delta in self.level.deltas:
            epsilon = book.epsilon(delta)
            holds(
                epsilon == math.inf or profiles.gaussian(mpf(epsilon) * (1 + self.slack()), mu) <= delta,
                f"epsilon({delta:g}) of {what} is {epsilon!r}, exact is "
                f"{float(profiles.gaussian_epsilon(delta, mu))!r}",
            )
        epsilon = 1.2 * float(mu)
        self._delta_not_below(book, profiles.gaussian(epsilon, mu), epsilon, what)

    def _delta_not_below(self, book: Accountant, least: mpf, epsilon: float, what: str) -> None:
        delta = book.delta(epsilon)
        holds(
            least <= mpf(delta) * (1 + self.slack()),
            f"delta({epsilon:g}) of {what} is {delta!r}, at least {float(least)!r} is reached",
        )

    @obligation("single_release", "a pair of neighbours that reaches this delta, with 60 digits")
    def single_release(self) -> None:
        """One release of any kind, sampled ones among them, is never cheaper than a known pair of neighbours."""
        for event in self.some(self.singly):
            book = self.after(event)
            for delta in self.level.deltas:
                epsilon = book.epsilon(delta)
                reached = None if epsilon == math.inf else profiles.at_least(event, mpf(epsilon) * (1 + self.slack()))
                holds(
                    epsilon == math.inf or (reached is not None and reached <= delta),
                    f"epsilon({delta:g}) of {event!r} is {epsilon!r}, where delta {float(reached or 0):.9g} is reached",
                )
            for epsilon in (0.05, 0.5)[: self.level.grid - 2]:
                least = profiles.at_least(event, epsilon)
                if least is not None:
                    self._delta_not_below(book, least, epsilon, repr(event))

    @obligation("sampled_composition", "lower bounds by optimistic discretisation")
    def sampled_composition(self) -> None:
        """Long Poisson-sampled compositions are not below an epsilon that they really have."""
        if not self.level.sampled:
            raise Undecided("looked at from the default level on")
        self.some(self.supported(PoissonSampled(0.01, Gaussian(1.0))))
        for case in SAMPLED[: self.level.sampled]:
            event = PoissonSampled(case.sampling_probability, Gaussian(case.noise_multiplier))
            epsilon = self.after((event, case.steps)).epsilon(case.delta)
            holds(
                epsilon >= case.epsilon,
                f"epsilon({case.delta:g}) of {case.steps} times {event!r} is {epsilon!r}, at least {case.epsilon} is "
                "reached",
            )

    @obligation("non_private", "a release without a guarantee costs everything")
    def non_private(self) -> None:
        for release in (NonPrivate(), Composed((NonPrivate(),)), SelfComposed(NonPrivate(), 3)):
            try:
                book = self.after(*self.known[:1], release)
            except UnsupportedEvent:
                continue
            epsilon, delta = book.epsilon(1e-5), book.delta(100.0)
            holds(epsilon == math.inf and delta == 1, f"{release!r} costs epsilon {epsilon!r}, delta {delta!r}")

    @obligation("self_composed", "SelfComposed(e, n) is e composed n times")
    def self_composed(self) -> None:
        for event in self.some(self.known):
            books = [
                self.after((event, 6)),
                self.after(SelfComposed(event, 6)),
                self.after(*[event] * 6),
                self.after((SelfComposed(event, 3), 2)),
                self.after(Composed((event, SelfComposed(event, 5)))),
            ]
            self._equal(books, f"6 times {event!r}, said in five ways,")

    @obligation("order", "the order of composition does not matter, and nothing added is free of charge")
    def order(self) -> None:
        for first, second in self.pairs():
            books = [self.after(first, second), self.after(second, first), self.after(Composed((second, first)))]
            self._equal(books, f"{first!r} and {second!r} in either order")
            alone, both = self.after(first).epsilon(1e-5), books[0].epsilon(1e-5)
            holds(both >= alone * (1 - 1e-6), f"{first!r} costs {alone!r}, with {second!r} added {both!r}")

    def _equal(self, books: list[Accountant], what: str) -> None:
        values = [book.epsilon(1e-5) for book in books]
        holds(
            max(values) == math.inf or max(values) - min(values) <= 1e-6 * max(values),
            f"{what} cost {', '.join(f'{value!r}' for value in values)} at delta 1e-5",
        )

    @obligation("adds_up", "more releases, or releases with less noise, cost more")
    def adds_up(self) -> None:
        families: tuple[Callable[[float], Event], ...] = (
            Gaussian,
            Laplace,
            lambda multiplier: PoissonSampled(0.02, Gaussian(multiplier)),
        )
        for kind in [kind for kind in families if self.supported(kind(1.0))][: self.level.events]:
            rows = {
                f"1, 2 and 20 times {kind(9.0)!r}": [(kind(9.0), count) for count in (1, 2, 20)],
                f"noise multipliers 9, 5 and 3 in {kind(9.0)!r}": [
                    (kind(multiplier), 2) for multiplier in (9.0, 5.0, 3.0)
                ],
            }
            for what, accounts in rows.items():
                values = [self.after(account).epsilon(1e-5) for account in accounts]
                rising = all(less < more or more == math.inf for less, more in itertools.pairwise(values))
                holds(rising, f"{what} cost {values}")

    @obligation("monotone", "a smaller delta never gives a smaller epsilon")
    def monotone(self) -> None:
        for event in self.of_one_relation()[:2]:
            book = self.after((event, 4))
            deltas = np.geomspace(1e-7, 0.3, self.level.grid + 1).tolist()
            for ask, arguments in ((book.epsilon, deltas), (book.delta, np.linspace(0.0, 4.0, len(deltas)).tolist())):
                answers = self._answers(ask, arguments)
                for (at, value), (next_, after) in itertools.pairwise(answers):
                    holds(
                        after <= value * (1 + 1e-9),
                        f"{ask.__name__} of 4 times {event!r} is {value!r} at {at:g}, but {after!r} at {next_:g}",
                    )

    @obligation("consistent", "delta at epsilon(delta) is that delta, up to the looseness of the bound")
    def consistent(self) -> None:
        for event in self.of_one_relation():
            book = self.after((event, 4))
            for delta in self.level.deltas:
                epsilon = book.epsilon(delta)
                above = epsilon * 1.05 + 0.05
                if epsilon < math.inf:
                    back = book.delta(above)
                    holds(back <= 2 * delta, f"epsilon({delta:g}) is {epsilon!r}, yet delta({above:.6g}) is {back!r}")

    def _answers(self, ask: Callable[[float], float], arguments: list[float]) -> list[tuple[float, float]]:
        """(argument, answer), without those that the accountant says it cannot answer."""
        answers = []
        for argument in arguments:
            try:
                answers.append((argument, float(ask(argument))))
            except UnsupportedEvent:
                continue
        return answers

    @obligation("never_nan", "an answer is a number >= 0, delta at most 1; or an error says that there is none")
    def never_nan(self) -> None:
        # Very little noise is left out: an accountant with a grid may take an hour over it.
        edges = (Gaussian(1e4), Laplace(100.0), PoissonSampled(1.0, Gaussian(5.0)), EpsilonDelta(0.0, 0.0))
        strange = self.supported(*edges)[: self.level.events]
        for event, count in itertools.product(self.some(strange), (1, 50)):
            book = self.after((event, count))
            for delta, epsilon in self._answers(book.epsilon, [0.0, 1e-14, 1e-5, 0.9]):
                holds(epsilon >= 0, f"epsilon({delta:g}) of {count} times {event!r} is {epsilon!r}")
            for epsilon, delta in self._answers(book.delta, [0.0, 1.0, 500.0]):
                holds(0 <= delta <= 1, f"delta({epsilon:g}) of {count} times {event!r} is {delta!r}")

    @obligation("state", "a restored accountant goes on where the first one was")
    def state(self) -> None:
        for event in self.some(self.known):
            first = self.after((event, 3))
            state = json.loads(json.dumps(first.state(), allow_nan=False))
            second = type(first).from_state(state)
            self._equal([first, second], f"3 times {event!r}, restored,")
            self._equal([first.compose(event), second.compose(event)], f"4 times {event!r}, restored after 3,")

    @obligation("unsupported", "what has no bound is refused, and the refusal leaves nothing behind")
    def unsupported(self) -> None:
        strange = NeverHeardOf(1.0)
        book = self.after(*self.known[:1])
        before = book.epsilon(1e-5)
        for event in (strange, Composed((strange,)), SelfComposed(strange, 2), PoissonSampled(0.5, strange)):
            holds(bool(book.supports(event)), f"supports({event!r}) has no reason against")
            try:
                book.compose(event)
            except UnsupportedEvent:
                continue
            raise Violated(f"compose({event!r}) must raise UnsupportedEvent; epsilon is {book.epsilon(1e-5)!r}")
        after = book.epsilon(1e-5)
        holds(after == before, f"refused events changed epsilon from {before!r} to {after!r}")

    @obligation("bad_values", "errors name what was expected")
    def bad_values(self) -> None:
        book = self.after(*self.known[:1])
        calls: list[tuple[str, Callable[[Any], object], Any]] = [
            *(("epsilon", book.epsilon, delta) for delta in (-1e-9, 1.5, math.nan)),
            *(("delta", book.delta, epsilon) for epsilon in (-1.0, math.nan)),
            *(("compose", lambda count: book.compose(self.known[0], count), count) for count in (0, -1)),
        ]
        for what, call, argument in calls:
            try:
                result = call(argument)
            except (DPFAError, ValueError):
                continue
            raise Violated(f"{what}() given {argument!r} must raise an error, it returned {result!r}")
