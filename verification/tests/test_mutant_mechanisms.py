"""Mechanisms with one fault each: every obligation of a mechanism rejects at least one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from dpfa_core.events import (
    DiscreteGaussian,
    EpsilonDelta,
    Exponential,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
)
from dpfa_core.spec import Claim, Structure
from dpfa_mechanisms import sensitivity as sensitivities
from dpfa_mechanisms.attention_aware import AttentionAware as TrueAttentionAware
from dpfa_mechanisms.block_diagonal import BlockDiagonal as TrueBlockDiagonal
from dpfa_mechanisms.discrete_gaussian import DiscreteGaussian as TrueDiscreteGaussian
from dpfa_mechanisms.exponential import Exponential as TrueExponential
from dpfa_mechanisms.gaussian import Gaussian as TrueGaussian
from dpfa_mechanisms.laplace import Laplace as TrueLaplace
from dpfa_mechanisms.low_rank import LowRank as TrueLowRank
from dpfa_mechanisms.sparse import Sparse as TrueSparse
from dpfa_verification.conformance.level import LEVELS
from dpfa_verification.conformance.mechanism import MechanismExamination, stated_claims
from dpfa_verification.conformance.obligation import discharge, obligations, verdict
from dpfa_verification.conformance.selection import SelectionExamination

QUICK = LEVELS["quick"]


def examination(mechanism: Callable[[], Any] = TrueGaussian, **changes: Callable[..., Any]) -> Any:
    """Of the true mechanism with some methods replaced; a replacement is given the true one first."""
    mutant, true = mechanism(), mechanism()
    for name, change in changes.items():
        setattr(mutant, name, partial(change, getattr(true, name)) if callable(change) else change)
    return (SelectionExamination if mutant.kind == "selection" else MechanismExamination)(mutant, QUICK)


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


LOW_RANK = Structure(kind="low_rank", parameters=(("rank", 33),), seed=0)


def with_parameters(**changed: float) -> Callable[..., Any]:
    def change(structure: Structure) -> Structure:
        return replace(structure, parameters=tuple((dict(structure.parameters) | changed).items()))

    return planned(structure=change)


def as_if_shrunk(true: Any, bound: Any, multipliers: Any, problem: Any) -> Any:
    """Takes the sensitivity for smaller by rank / head_dim, as if a projection shortened every difference."""
    rank = dict(true(bound, multipliers, problem).structure.parameters)["rank"]
    return true(replace(bound, value=bound.value * rank / problem.head_dim), multipliers, problem)


def unscaled(true: Any, bound: Any, multipliers: Any, problem: Any) -> Any:
    """Noise for the columns as they were before they were multiplied."""
    plan = true(bound, multipliers, problem)
    return replace(plan, head_scale=TrueSparse().plan(bound, multipliers, problem).head_scale)


def quiet_row(scales: tuple[float, ...]) -> tuple[float, ...]:
    """The rows with the most keys have 1 % too little noise."""
    return (*scales[:-1], 0.99 * scales[-1])


def proportional(true: Any, bound: Any, multipliers: Any, problem: Any) -> Any:
    """Every row has noise in proportion to its own bound, but the whole is scaled as if noise were even."""
    rows = tuple(max(row, 1e-9) / max(bound.row_bound) for row in bound.row_bound)
    return replace(TrueGaussian().plan(bound, multipliers, problem), mechanism="attention_aware", row_scale=rows)


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
    ("shape", {"plan": planned(row_scale=lambda scales: (1.0, 1.0, 1.0))}),
    ("shape", {"plan": planned(head_scale=lambda scales: scales * 2)}),
    ("shape", {"plan": planned(grid=lambda grid: 0.25)}),
    ("shape", {"plan": planned(structure=lambda structure: LOW_RANK)}),
    ("moves", {"plan": scaled(0.999)}),
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


STRUCTURED: list[tuple[Callable[[], Any], str, dict[str, Any]]] = [
    (TrueLowRank, "calibration", {"plan": as_if_shrunk}),
    (TrueLowRank, "moves", {"plan": as_if_shrunk}),
    (TrueLowRank, "shape", {"plan": with_parameters(rank=0.5)}),
    (TrueLowRank, "shape", {"plan": planned(distribution=lambda kind: "laplace")}),
    (TrueSparse, "moves", {"plan": with_parameters(rescale=1)}),
    (TrueSparse, "shape", {"plan": with_parameters(kept=4)}),
    (TrueSparse, "shape", {"plan": with_parameters(seed=4)}),
    (partial(TrueSparse, rescale=True), "calibration", {"plan": unscaled}),
    (partial(TrueSparse, rescale=True), "heads", {"plan": unscaled}),
    (partial(TrueSparse, rescale=True), "moves", {"plan": unscaled}),
    (partial(TrueSparse, rescale=True), "event", {"plan": unscaled}),
    (TrueBlockDiagonal, "calibration", {"plan": planned(norm=lambda norm: "l2")}),
    (TrueBlockDiagonal, "shape", {"plan": planned(structure=lambda structure: None)}),
    (TrueBlockDiagonal, "shape", {"plan": with_parameters(condition=0.5)}),
    (TrueAttentionAware, "moves", {"plan": planned(row_scale=quiet_row)}),
    (TrueAttentionAware, "moves", {"plan": proportional}),
    (TrueAttentionAware, "moves", {"plan": planned(row_scale=lambda scales: (*scales[:-1], 0.0))}),
    (TrueAttentionAware, "calibration", {"calibrate": lambda true, epsilon, delta: 0.999 * true(epsilon, delta)}),
    (TrueAttentionAware, "refusal", {"supports": permissive("logit_bound")}),
    (TrueDiscreteGaussian, "shape", {"plan": planned(grid=lambda grid: 0.0)}),
    (TrueDiscreteGaussian, "shape", {"plan": planned(grid=lambda grid: 0.1)}),
    (TrueDiscreteGaussian, "event", {"event": lambda true, multiplier: DiscreteGaussian(1.02 * multiplier)}),
    (TrueDiscreteGaussian, "calibration", {"calibrate": lambda true, epsilon, delta: 0.5 * true(epsilon, delta)}),
    (partial(TrueDiscreteGaussian, grid=8.0), "calibration", {"plan": planned(head_scale=lambda scales: (4.0,))}),
]


@pytest.mark.parametrize(
    ("mechanism", "name", "changes"),
    STRUCTURED,
    ids=[f"{n}-{make().name}-{name}" for n, (make, name, _) in enumerate(STRUCTURED)],
)
def test_the_obligation_rejects_the_structured_mutant(
    mechanism: Callable[[], Any], name: str, changes: dict[str, Any]
) -> None:
    found, text = verdict(examination(mechanism, **changes), name)
    assert found == "failed", text
    assert text


def picking(select: Callable[..., Any]) -> dict[str, Any]:
    return {"select": lambda true, *given: select(*given)}


def in_floats(scores: Any, sensitivity: float, epsilon: float, random_bits: Any) -> int:
    """The largest score with Gumbel noise, which has the right law, but noise of its own."""
    noisy = [epsilon * score / (2 * sensitivity) - math.log(-math.log(random.random())) for score in scores]
    return noisy.index(max(noisy))


SELECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("contract", {"claims": anything(())}),
    ("selection_law", {"select": lambda true, scores, s, e, bits: true(scores, s, 1.2 * e, bits)}),
    ("selection_law", {"select": lambda true, scores, s, e, bits: true(scores, 1.0, e, bits)}),
    ("selection_law", {"select": anything(-1)}),
    ("selection_law", {"select": anything(True)}),
    ("privacy_ratio", {"select": lambda true, scores, s, e, bits: true(scores, s, 2 * e, bits)}),
    ("privacy_ratio", picking(lambda scores, *rest: scores.index(max(scores)))),
    ("price", {"calibrate": lambda true, epsilon, delta: 0.999 * true(epsilon, delta)}),
    ("price", {"event": lambda true, multiplier: Exponential(0.999 / multiplier)}),
    ("price", {"event": anything(None)}),
    ("randomness", picking(in_floats)),
    ("randomness", {"select": anything(0)}),
    ("refusal", {"supports": anything(())}),
    ("bad_values", {"select": unchecked}),
    ("bad_values", {"calibrate": unchecked}),
]


@pytest.mark.parametrize(("name", "changes"), SELECTIONS, ids=[f"{n}-{m[0]}" for n, m in enumerate(SELECTIONS)])
def test_the_obligation_rejects_the_broken_selection(name: str, changes: dict[str, Any]) -> None:
    found, text = verdict(examination(TrueExponential, **changes), name)
    assert found == "failed", text
    assert text


def test_every_obligation_of_a_selection_has_a_mutant() -> None:
    assert set(obligations(examination(TrueExponential))) == {name for name, _ in SELECTIONS}


def test_another_law_is_held_to_the_ratio_alone() -> None:
    """Gumbel noise on the scores keeps the ratio; a mechanism that claims no law is not asked for one."""
    other = examination(TrueExponential, claims=anything((Claim("price"),)), **picking(in_floats))
    assert verdict(other, "privacy_ratio") == ("tested", "")
    assert verdict(other, "selection_law")[0] == "assumed"


@pytest.mark.parametrize(
    ("unit", "constant"), [("sequence", "_sequence"), ("token", "max_weight"), ("token", "own_row_factor")]
)
def test_a_sensitivity_too_small_is_rejected(monkeypatch: pytest.MonkeyPatch, unit: str, constant: str) -> None:
    true = getattr(sensitivities, constant)

    def smaller(*arguments: Any) -> Any:
        value = true(*arguments)
        return replace(value, value=0.98 * value.value) if unit == "sequence" else 0.98 * value

    sensitivities.row_bounds.cache_clear()
    monkeypatch.setattr(sensitivities, constant, smaller)
    found, text = verdict(examination(), "sensitivity")
    sensitivities.row_bounds.cache_clear()
    assert found == "failed"
    assert f"unit='{unit}'" in text


def test_every_obligation_has_a_mutant() -> None:
    assert set(obligations(examination())) == {name for name, _ in MUTANTS} | {"sensitivity"}


@pytest.mark.parametrize(
    "mechanism",
    [
        TrueGaussian,
        TrueLaplace,
        TrueLowRank,
        partial(TrueLowRank, rank=1),
        TrueSparse,
        partial(TrueSparse, rescale=True),
        TrueBlockDiagonal,
        partial(TrueBlockDiagonal, block_size=5, condition=100.0),
        TrueAttentionAware,
        TrueDiscreteGaussian,
        partial(TrueDiscreteGaussian, grid=0.5),
        TrueExponential,
    ],
)
def test_the_unchanged_mechanism_passes(mechanism: Callable[[], Any]) -> None:
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
    for name in ("calibration", "event", "moves"):
        assert verdict(custom, name)[0] == "assumed"
    sampled = examination(event=lambda true, multiplier: PoissonSampled(0.5, Gaussian(multiplier)))
    found, text = verdict(sampled, "event")
    assert (found, "no formula for the event" in text) == ("assumed", True)


def test_claims_that_no_check_bears_the_name_of_are_assumed() -> None:
    own = examination(claims=anything((Claim("calibration", status="proved"), Claim("beauty", status="proved"))))
    found = stated_claims(own.mechanism, discharge(own))
    assert [(claim.obligation, verdict) for claim, verdict, _ in found] == [("beauty", "assumed")]
