"""Mechanisms with one fault each: every obligation of a mechanism rejects at least one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from dpfa_core.events import EpsilonDelta, Gaussian, Laplace, NonPrivate, PoissonSampled
from dpfa_core.spec import Claim
from dpfa_mechanisms import sensitivity as sensitivities
from dpfa_mechanisms.gaussian import Gaussian as TrueGaussian
from dpfa_mechanisms.laplace import Laplace as TrueLaplace
from dpfa_verification.conformance.level import LEVELS
from dpfa_verification.conformance.mechanism import MechanismExamination, stated_claims
from dpfa_verification.conformance.obligation import discharge, obligations, verdict

QUICK = LEVELS["quick"]


def examination(mechanism: type = TrueGaussian, **changes: Callable[..., Any]) -> MechanismExamination:
    """Of the true mechanism with some methods replaced; a replacement is given the true one first."""
    mutant, true = mechanism(), mechanism()
    for name, change in changes.items():
        setattr(mutant, name, partial(change, getattr(true, name)) if callable(change) else change)
    return MechanismExamination(mutant, QUICK)


def planned(**fields: Callable[[Any], Any]) -> Callable[..., Any]:
    def change(true: Any, *arguments: Any) -> Any:
        plan = true(*arguments)
        return replace(plan, **{name: new(getattr(plan, name)) for name, new in fields.items()})

    return change


def short_for_many_heads(true: Any, bound: Any, multipliers: Any, problem: Any) -> Any:
    return scaled(0.9 if len(multipliers) > 1 else 1.0)(true, bound, multipliers, problem)


def first_for_all_heads(true: Any, bound: Any, multipliers: Any, problem: Any) -> Any:
    return true(bound, multipliers[:1], problem)


def scaled(factor: float) -> Callable[..., Any]:
    return planned(head_scale=lambda scales: tuple(factor * scale for scale in scales))


def textbook(true: Any, epsilon: float, delta: float) -> float:
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def saw(true: Any, epsilon: float, delta: float) -> float:
    return true(epsilon, delta) * (1 + 0.5 * (math.floor(8 * epsilon) % 2))


def anything(value: Any) -> Callable[..., Any]:
    return lambda true, *arguments: value


def permissive(what: str) -> Callable[..., Any]:
    """supports() without the reasons that mention `what`."""
    return lambda true, spec, problem: tuple(reason for reason in true(spec, problem) if what not in reason)


def unchecked(true: Any, *arguments: Any) -> Any:
    try:
        return true(*arguments)
    except ValueError:
        return 1.0


MUTANTS: list[tuple[str, dict[str, Any]]] = [
    ("contract", {"claims": anything(())}),
    ("contract", {"claims": anything([Claim("calibration")])}),
    ("contract", {"plan": planned(transform=lambda transform: "bm32")}),
    ("contract", {"plan": planned(mechanism=lambda name: "other")}),
    ("contract", {"plan": planned(norm=lambda norm: "l1")}),
    ("calibration", {"plan": scaled(0.98)}),
    ("calibration", {"calibrate": lambda true, epsilon, delta: 0.999 * true(epsilon, delta)}),
    ("calibration", {"calibrate": textbook}),
    ("calibration", {"plan": planned(row_scale=lambda scales: (1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0))}),
    ("calibration", {"plan": planned(distribution=lambda kind: "laplace")}),
    ("event", {"event": lambda true, multiplier: Gaussian(1.001 * multiplier)}),
    ("event", {"event": lambda true, multiplier: EpsilonDelta(1.0, 1e-5)}),
    ("event", {"event": anything(None)}),
    ("heads", {"plan": short_for_many_heads}),
    ("heads", {"plan": first_for_all_heads}),
    ("monotone", {"calibrate": saw}),
    ("monotone", {"calibrate": anything(math.inf)}),
    ("refusal", {"supports": permissive("value")}),
    ("refusal", {"supports": permissive("logit_bound")}),
    ("refusal", {"supports": permissive("clip_norm")}),
    ("refusal", {"supports": permissive("inf")}),
    ("refusal", {"supports": permissive("training")}),
    ("refusal", {"supports": anything(("never.",))}),
    ("refusal", {"supports": lambda true, *given: list(true(*given))}),
    ("bad_values", {"calibrate": unchecked}),
    ("bad_values", {"plan": unchecked}),
]


@pytest.mark.parametrize(("name", "changes"), MUTANTS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MUTANTS)])
def test_the_obligation_rejects_the_mutant(name: str, changes: dict[str, Any]) -> None:
    found, text = verdict(examination(**changes), name)
    assert found == "failed", text
    assert text


@pytest.mark.parametrize(
    ("unit", "constant"), [("sequence", "_sequence"), ("token", "max_weight"), ("token", "own_row_factor")]
)
def test_a_sensitivity_too_small_is_rejected(monkeypatch: pytest.MonkeyPatch, unit: str, constant: str) -> None:
    true = getattr(sensitivities, constant)

    def smaller(*arguments: Any) -> Any:
        value = true(*arguments)
        return replace(value, value=0.98 * value.value) if unit == "sequence" else 0.98 * value

    sensitivities._token.cache_clear()
    monkeypatch.setattr(sensitivities, constant, smaller)
    found, text = verdict(examination(), "sensitivity")
    sensitivities._token.cache_clear()
    assert found == "failed"
    assert f"unit='{unit}'" in text


def test_every_obligation_has_a_mutant() -> None:
    assert set(obligations(examination())) == {name for name, _ in MUTANTS} | {"sensitivity"}


@pytest.mark.parametrize("mechanism", [TrueGaussian, TrueLaplace])
def test_the_unchanged_mechanism_passes(mechanism: type) -> None:
    found = discharge(examination(mechanism))
    assert {verdict for _, verdict, _ in found} == {"tested"}, found


def test_laplace_noise_too_small_is_rejected() -> None:
    assert verdict(examination(TrueLaplace, plan=scaled(0.99)), "calibration")[0] == "failed"
    cheaper = examination(TrueLaplace, event=lambda true, multiplier: Laplace(1.01 * multiplier))
    assert verdict(cheaper, "event")[0] == "failed"


def test_a_price_above_the_true_one_is_no_fault() -> None:
    for dearer in (
        lambda true, multiplier: Gaussian(0.9 * multiplier),
        lambda true, multiplier: NonPrivate(),
    ):
        assert verdict(examination(event=dearer), "event") == ("tested", "")


def test_what_has_no_formula_is_assumed_not_tested() -> None:
    custom = examination(plan=planned(distribution=lambda kind: "custom"))
    for name in ("calibration", "event"):
        assert verdict(custom, name)[0] == "assumed"
    sampled = examination(event=lambda true, multiplier: PoissonSampled(0.5, Gaussian(multiplier)))
    found, text = verdict(sampled, "event")
    assert (found, "no formula for the event" in text) == ("assumed", True)


def test_claims_that_no_check_bears_the_name_of_are_assumed() -> None:
    own = examination(claims=anything((Claim("calibration", status="proved"), Claim("beauty", status="proved"))))
    found = stated_claims(own.mechanism, discharge(own))
    assert [(claim.obligation, verdict) for claim, verdict, _ in found] == [("beauty", "assumed")]
