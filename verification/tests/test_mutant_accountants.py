"""Accountants with one fault each: every obligation of an accountant rejects at least one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import Composed, Event, Gaussian, NonPrivate, PoissonSampled, SelfComposed
from dpfa_verification.conformance.accountant import AccountantExamination, NeverHeardOf
from dpfa_verification.conformance.level import LEVELS
from dpfa_verification.conformance.obligation import discharge, obligations, verdict

# RDP is quick and prices sampled releases, so mutants of it can be looked at as closely as the default does.
LEVEL = LEVELS["default"]


def mutant(**changes: Any) -> type:
    """The true accountant with some members replaced."""
    return type("Mutant", (RdpAccountant,), changes)


def answered(change: Callable[[float], float], question: str = "epsilon") -> dict[str, Any]:
    def ask(self: Any, argument: float) -> float:
        return change(getattr(RdpAccountant, question)(self, argument))

    return {question: ask}


def composed(change: Callable[[Event, int], tuple[Event, int] | None]) -> dict[str, Any]:
    """compose() that books something else, or nothing."""

    def compose(self: Any, event: Event, count: int = 1) -> Any:
        booked = change(event, count)
        return self if booked is None else RdpAccountant.compose(self, *booked)

    return {"compose": compose}


def counted_once(event: Event, count: int) -> tuple[Event, int]:
    return (event.event if isinstance(event, SelfComposed) else event, count)


def first_part_only(event: Event, count: int) -> tuple[Event, int]:
    return (event.events[0] if isinstance(event, Composed) and event.events else event, count)


class SampledAgain(PldAccountant):
    """A sampled release priced as if fewer took part."""

    def compose(self, event: Event, count: int = 1) -> Any:
        if isinstance(event, PoissonSampled):
            event = PoissonSampled(0.9 * event.sampling_probability, event.event, event.relation)
        return super().compose(event, count)


def shrug(self: Any, event: Event, count: int = 1) -> Any:
    try:
        return RdpAccountant.compose(self, event, count)
    except UnsupportedEvent:
        return self


def free_of_charge(event: Event, count: int) -> tuple[Event, int] | None:
    leaves = event.events if isinstance(event, Composed) else (event,)
    private = [leaf for leaf in leaves if not isinstance(getattr(leaf, "event", leaf), NonPrivate)]
    return None if not private else (event, count)


class Forgetful(RdpAccountant):
    """An account that remembers only the last kind of event."""

    def compose(self, event: Event, count: int = 1) -> Any:
        if event not in self._counts:
            self._counts.clear()
        return super().compose(event, count)


class LossyState(RdpAccountant):
    def state(self) -> dict[str, Any]:
        return {"events": [[event, 1] for event, _ in super().state()["events"]]}


class KeepsWhatItRefuses(RdpAccountant):
    def compose(self, event: Event, count: int = 1) -> Any:
        try:
            return super().compose(event, count)
        except UnsupportedEvent:
            super().compose(Gaussian(20.0))
            raise


def rising(self: Any, delta: float) -> float:
    return RdpAccountant.epsilon(self, delta) + (2.0 if 1e-5 < delta < 1e-2 else 0.0)


MUTANTS: list[tuple[str, type]] = [
    ("contract", mutant(bound="roughly")),
    ("contract", mutant(supports=lambda self, event: "")),
    ("contract", mutant(compose=lambda self, event, count=1: RdpAccountant.compose(RdpAccountant(), event, count))),
    ("empty", mutant(**answered(lambda epsilon: epsilon + 0.1))),
    ("empty", mutant(**answered(lambda delta: 1.0, "delta"))),
    ("gaussian_exact", mutant(**answered(lambda epsilon: 0.9 * epsilon))),
    ("gaussian_exact", mutant(**answered(lambda delta: 0.1 * delta, "delta"))),
    ("gaussian_exact", mutant(**composed(lambda event, count: (event, max(1, count // 2))))),
    ("single_release", SampledAgain),
    ("single_release", mutant(**answered(lambda epsilon: 0.8 * epsilon))),
    ("sampled_composition", mutant(**answered(lambda epsilon: 0.85 * epsilon))),
    ("non_private", mutant(**composed(free_of_charge))),
    ("non_private", mutant(**answered(lambda epsilon: min(epsilon, 1e9)))),
    ("self_composed", mutant(**composed(counted_once))),
    ("self_composed", mutant(**composed(first_part_only))),
    ("order", Forgetful),
    ("order", mutant(**composed(first_part_only))),
    ("adds_up", mutant(**composed(lambda event, count: (event, 1)))),
    ("adds_up", mutant(**answered(lambda epsilon: 100.0))),
    ("monotone", mutant(epsilon=rising)),
    ("monotone", mutant(**answered(lambda delta: 1.0 - delta, "delta"))),
    ("consistent", mutant(**answered(lambda delta: min(1.0, 100 * delta), "delta"))),
    ("never_nan", mutant(**answered(lambda epsilon: math.nan if epsilon == 0 else epsilon))),
    ("never_nan", mutant(**answered(lambda delta: 2.0 * delta + 1.0, "delta"))),
    ("state", LossyState),
    ("unsupported", mutant(compose=shrug, supports=lambda self, event: ())),
    ("unsupported", mutant(compose=shrug)),
    ("unsupported", KeepsWhatItRefuses),
    ("bad_values", mutant(delta=lambda self, epsilon: 0.0)),
]


@pytest.mark.parametrize(("name", "accountant"), MUTANTS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MUTANTS)])
def test_the_obligation_rejects_the_mutant(name: str, accountant: type) -> None:
    found, text = verdict(AccountantExamination(accountant, LEVEL), name)
    assert found == "failed", text
    assert text


def test_every_obligation_has_a_mutant() -> None:
    assert set(obligations(AccountantExamination(RdpAccountant, LEVEL))) == {name for name, _ in MUTANTS}


def test_the_unchanged_accountant_passes() -> None:
    found = discharge(AccountantExamination(RdpAccountant, LEVEL))
    assert {verdict for _, verdict, _ in found} == {"tested"}, found


def test_an_exact_accountant_is_granted_no_round_off() -> None:
    class Almost(GdpAccountant):
        def epsilon(self, delta: float) -> float:
            return super().epsilon(delta) * (1 - 1e-10)

    assert verdict(AccountantExamination(Almost, LEVEL), "gaussian_exact")[0] == "failed"


def test_an_accountant_of_nothing_is_assumed_not_tested() -> None:
    class Refuses(RdpAccountant):
        def supports(self, event: Event) -> tuple[str, ...]:
            return ("never.",)

    examination = AccountantExamination(Refuses, LEVEL)
    for name in ("gaussian_exact", "single_release", "sampled_composition", "self_composed", "order", "monotone"):
        assert verdict(examination, name)[0] == "assumed", name
    assert verdict(examination, "unsupported") == ("tested", "")
    assert NeverHeardOf(1.0).to_json() == {"event": "NeverHeardOf", "secret": 1.0}
