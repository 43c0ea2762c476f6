"""A plan is held to the multiplier that its event is priced by, structure and roundings included."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dpfa_attention.plan_checks import check_plan, check_structure, moved
from dpfa_core.errors import PluginError
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Sensitivity, Structure
from dpfa_mechanisms.sensitivity import sensitivity

PROBLEM = AttentionProblem(
    batch=1, q_len=8, kv_len=8, q_heads=2, kv_heads=2, head_dim=32, clip_norm=1.0, dtype="bfloat16"
)
SPEC = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")


def planned(name: str, multiplier: float = 3.0, **parameters: Any) -> tuple[NoisePlan, Sensitivity]:
    mechanism = MECHANISMS.create(name, **parameters)
    bound = sensitivity(SPEC, PROBLEM, mechanism.norm)
    return mechanism.plan(bound, (multiplier,), PROBLEM), bound


def check(name: str, plan: NoisePlan, bound: Sensitivity, multiplier: float = 3.0) -> None:
    entry = MECHANISMS.entry(name)
    check_structure(entry, plan, PROBLEM)
    check_plan(entry, plan, multiplier, bound, SPEC, PROBLEM)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("low_rank", {}),
    ("sparse", {}),
    ("sparse", {"rescale": True}),
    ("block_diagonal", {}),
    ("block_diagonal", {"condition": 1000.0}),
    ("discrete_gaussian", {}),
]


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_what_a_mechanism_plans_passes_and_a_little_less_does_not(name: str, parameters: dict[str, Any]) -> None:
    plan, bound = planned(name, **parameters)
    check(name, plan, bound)
    least = 3.0 * moved(bound.value, plan, PROBLEM)
    assert least <= plan.head_scale[0]
    with pytest.raises(PluginError, match="must plan noise of scale"):
        check(name, dataclasses.replace(plan, head_scale=(least * (1 - 1e-9),)), bound)


@pytest.mark.parametrize(
    ("name", "parameters"), [("low_rank", {}), ("sparse", {"rescale": True}), ("block_diagonal", {})]
)
def test_a_plan_without_the_margin_of_its_structure_is_refused(name: str, parameters: dict[str, Any]) -> None:
    plan, bound = planned(name, **parameters)
    bare = dataclasses.replace(plan, head_scale=(3.0 * bound.value,))
    with pytest.raises(PluginError, match="must plan noise of scale"):
        check(name, bare, bound)


@pytest.mark.parametrize(
    ("kind", "parameters", "norm", "text"),
    [
        ("low_rank", (), "l2", "needs the parameter 'rank'"),
        ("low_rank", (("rank", 33.0),), "l2", "rank must be an integer from 1 to 32"),
        ("sparse", (("kept", 4.0),), "l2", "sparse noise needs the parameters"),
        ("block_diagonal", (("block_size", 8.0), ("condition", 4.0)), "l2", "needs a clip in whitened_l2"),
        ("block_diagonal", (("block_size", 8.0), ("condition", 1e6)), "whitened_l2", "a condition in"),
        ("block_diagonal", (("block_size", 8.0), ("condition", 0.5)), "whitened_l2", "condition must be at least 1"),
    ],
)
def test_a_structure_that_cannot_be_made_is_refused(kind: Any, parameters: Any, norm: Any, text: str) -> None:
    structure = Structure(kind=kind, parameters=parameters, seed=0)
    plan = NoisePlan(mechanism=kind, distribution="gaussian", head_scale=(1e6,), norm=norm, structure=structure)
    with pytest.raises(PluginError, match=text):
        check_structure(MECHANISMS.entry("gaussian"), plan, PROBLEM)


def test_heads_without_noise_are_left_out_and_the_others_are_held_to_the_multiplier() -> None:
    plan, bound = planned("gaussian")
    # one head alone moves by its share of the sensitivity
    scale = plan.head_scale[0] / 2**0.5
    check("gaussian", dataclasses.replace(plan, head_scale=(scale, 0.0), noiseless_heads=True), bound)
    with pytest.raises(PluginError, match="rows and heads that together have"):
        check("gaussian", dataclasses.replace(plan, head_scale=(scale * 0.999, 0.0), noiseless_heads=True), bound)
