"""Totals are checked by composing the parts again, and optima against everything else that keeps the total."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Composed, Gaussian, Laplace, NonPrivate
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.allocation import Allocation, by_epsilons, importance_based, uniform
from dpfa_mechanisms.gaussian import Gaussian as GaussianMechanism
from dpfa_mechanisms.gaussian import gaussian_delta, gaussian_epsilon
from dpfa_mechanisms.noise_energy import plan_multiplier
from dpfa_mechanisms.planning import noise_plan
from dpfa_mechanisms.sensitivity import sensitivity

Weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def composed(multipliers: tuple[float, ...]) -> float:
    """The one Gaussian as strong as all of them, in exact arithmetic up to the root."""
    squares = sum(1 / Fraction(multiplier) ** 2 for multiplier in multipliers)
    return math.sqrt(1 / squares)


def least_epsilon_reached(multipliers: tuple[float, ...], delta: float) -> float:
    return gaussian_epsilon(composed(multipliers), delta)


@settings(max_examples=60, deadline=None)
@given(Weights, st.floats(1e-3, 30.0), st.floats(-12.0, -0.5), st.sampled_from(["uniform", "ratios", "importance"]))
def test_gaussian_totals_reach_the_target_and_never_exceed_it(
    weights: list[float], epsilon: float, log10_delta: float, strategy: str
) -> None:
    delta = 10.0**log10_delta
    if strategy == "uniform":
        found = uniform(epsilon, delta, len(weights))
    elif strategy == "ratios":
        found = by_epsilons(weights, delta, epsilon=epsilon)
    else:
        found = importance_based(weights, epsilon, delta)
    assert found.epsilon <= epsilon
    assert isinstance(found.event, Gaussian)
    # the event is at least as weak as the parts, and its price is the total
    assert found.event.noise_multiplier <= composed(found.noise_multipliers)
    assert gaussian_delta(epsilon, found.event.noise_multiplier) <= delta
    needed = GaussianMechanism().calibrate(epsilon, delta)
    assert composed(found.noise_multipliers) == pytest.approx(needed, rel=1e-9)
    assert found.epsilon == pytest.approx(epsilon, rel=1e-9)
    for multiplier, part in zip(found.noise_multipliers, found.part_epsilons, strict=True):
        assert gaussian_delta(part, multiplier) <= delta


@settings(max_examples=60, deadline=None)
@given(Weights, st.floats(1e-3, 30.0), st.sampled_from(["uniform", "ratios", "importance"]))
def test_laplace_epsilons_add_up_to_the_target(weights: list[float], epsilon: float, strategy: str) -> None:
    if strategy == "uniform":
        found = uniform(epsilon, 0.0, len(weights), mechanism="laplace")
    elif strategy == "ratios":
        found = by_epsilons(weights, 0.0, epsilon=epsilon, mechanism="laplace")
    else:
        found = importance_based(weights, epsilon, 0.0, mechanism="laplace")
    total = sum(1 / Fraction(multiplier) for multiplier in found.noise_multipliers)
    assert total <= Fraction(found.epsilon) <= Fraction(epsilon)
    assert float(total) == pytest.approx(epsilon, rel=1e-9)
    assert found.event == Composed(tuple(Laplace(multiplier) for multiplier in found.noise_multipliers))


@settings(max_examples=80, deadline=None)
@given(Weights, st.sampled_from(["gaussian", "laplace"]), st.integers(0, 2**32 - 1))
def test_no_other_allocation_with_the_same_total_is_better(weights: list[float], mechanism: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moves = rng.uniform(0.2, 5.0, len(weights))
    found = importance_based(weights, 2.0, 1e-5, sensitivities=moves.tolist(), mechanism=mechanism)
    power = 1 if mechanism == "laplace" else 2
    ours = np.array(found.noise_multipliers)
    total = (ours**-power).sum()
    best = (np.array(weights) * (ours * moves) ** 2).sum()
    for spread in (1e-3, 0.1, 1.0):
        for _ in range(10):
            other = ours * np.exp(spread * rng.standard_normal(len(weights)))
            other *= ((other**-power).sum() / total) ** (1 / power)
            assert (np.array(weights) * (other * moves) ** 2).sum() >= best * (1 - 1e-9)


def test_important_heads_get_less_noise_by_the_fourth_root() -> None:
    found = importance_based([1.0, 16.0, 81.0], 1.0, 1e-5)
    ratios = [found.noise_multipliers[0] / multiplier for multiplier in found.noise_multipliers]
    assert ratios == pytest.approx([1.0, 2.0, 3.0])


def test_composed_heads_lose_what_one_gaussian_of_their_mu_loses() -> None:
    """An audit: the privacy loss of all heads together, sampled, has the delta of the one event."""
    found = by_epsilons([0.5, 1.0, 2.0], 1e-2, epsilon=1.5)
    mu = 1.0 / np.array(found.noise_multipliers)
    draw = np.random.default_rng(5).standard_normal((1_000_000, 3))
    loss = draw @ mu + (mu**2).sum() / 2
    for epsilon in (0.0, 0.5, 1.5):
        sampled = np.maximum(0.0, -np.expm1(epsilon - loss)).mean()
        assert isinstance(found.event, Gaussian)
        assert sampled == pytest.approx(gaussian_delta(epsilon, found.event.noise_multiplier), rel=0.03)


def test_epsilons_alone_are_absolute_and_their_total_is_reported() -> None:
    found = by_epsilons((0.5, 1.0, 4.0), 1e-5, heads=3)
    assert found.noise_multipliers == tuple(GaussianMechanism().calibrate(e, 1e-5) for e in (0.5, 1.0, 4.0))
    assert found.part_epsilons == pytest.approx((0.5, 1.0, 4.0))
    # less than the sum, because squares of mu add up, and more than the largest
    assert 4.0 < found.epsilon < 5.5
    assert found.epsilon == pytest.approx(least_epsilon_reached(found.noise_multipliers, 1e-5), rel=1e-9)


def test_their_own_total_changes_nothing() -> None:
    """The ratios that a list fixes are those it has alone."""
    alone = by_epsilons([0.5, 1.0, 4.0], 1e-5)
    again = by_epsilons([0.5, 1.0, 4.0], 1e-5, epsilon=alone.epsilon)
    assert again.noise_multipliers == pytest.approx(alone.noise_multipliers, rel=1e-9)
    half = by_epsilons([0.5, 1.0, 4.0], 1e-5, epsilon=2.0)
    ratios = np.array(half.noise_multipliers) / np.array(alone.noise_multipliers)
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-12)


def test_a_plan_of_heads_keeps_the_total() -> None:
    """From the list to scales, and back by adding up what one record moves in every row."""
    problem = AttentionProblem(
        batch=1, q_len=9, kv_len=9, q_heads=4, kv_heads=2, head_dim=8, causal=True, clip_norm=1.0, logit_bound=1.0
    )
    spec = PrivacySpec(epsilon=3.0, delta=1e-6, unit="token", queries="private")
    found = by_epsilons([1.0, 2.0, 3.0, 4.0], spec.delta, epsilon=spec.epsilon)
    plan = GaussianMechanism().plan(sensitivity(spec, problem), found.noise_multipliers, problem)
    kept = gaussian_epsilon(plan_multiplier(plan, spec, problem), spec.delta)
    assert 2.999 < kept <= 3.0


def test_heads_without_noise_need_an_explicit_word_and_cost_everything() -> None:
    with pytest.raises(PrivacyParameterError, match=r"got inf for head 1; .* allow_infinite_heads=True accepts"):
        by_epsilons([1.0, math.inf], 1e-5)
    for epsilon in (None, 0.7):
        found = by_epsilons([1.0, math.inf], 1e-5, epsilon=epsilon, allow_infinite=True)
        noisy = GaussianMechanism().calibrate(epsilon or 1.0, 1e-5)
        assert found.noise_multipliers == pytest.approx((noisy, 0.0), rel=1e-12)
        assert found.noise_multipliers[0] >= noisy
        assert (found.epsilon, found.event) == (math.inf, NonPrivate())
        assert found.part_epsilons == pytest.approx((epsilon or 1.0, math.inf))
    with pytest.raises(PrivacyParameterError, match="must hold a finite number for at least one head"):
        by_epsilons([math.inf, math.inf], 1e-5, allow_infinite=True)


def test_plans_take_heads_without_noise_only_when_told() -> None:
    problem = AttentionProblem(batch=1, q_len=2, kv_len=2, q_heads=2, kv_heads=2, head_dim=4, clip_norm=1.0)
    bound = sensitivity(PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence"), problem)
    with pytest.raises(PrivacyParameterError, match=r"noise_multiplier must be a finite number > 0, got 0\.0"):
        noise_plan("gaussian", "gaussian", "l2", bound, (1.0, 0.0), problem)
    plan = noise_plan("gaussian", "gaussian", "l2", bound, (1.0, 0.0), problem, noiseless_heads=True)
    assert plan.noiseless_heads
    assert plan.head_scale[0] >= bound.value / math.sqrt(2)
    assert plan.head_scale[1] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_epsilons([1.0, 2.0], 1e-5, heads=3), "head_epsilons must hold 3 numbers, one for each part, got 2"),
        (lambda: by_epsilons([1.0, 0.0], 1e-5), r"head_epsilons\[1\] must be a number > 0, got 0\.0"),
        (lambda: by_epsilons([math.nan], 1e-5), r"head_epsilons\[0\] must be a number > 0, got nan"),
        (lambda: by_epsilons([], 1e-5), r"head_epsilons must be a list of numbers, one for each part, got \[\]"),
        (lambda: by_epsilons("12", 1e-5), "head_epsilons must be a list of numbers"),  # type: ignore[arg-type]
        (lambda: by_epsilons([1.0], 0.0), r"delta must be in \(0, 1\), got 0"),
        (lambda: by_epsilons([1.0], 1e-5, epsilon=math.inf), "epsilon must be a finite number > 0, got inf"),
        (lambda: importance_based([1.0, -1.0], 1.0, 1e-5), r"importances\[1\] must be a finite number > 0, got -1"),
        (lambda: importance_based([math.inf], 1.0, 1e-5), r"importances\[0\] must be a finite number > 0, got inf"),
        (
            lambda: importance_based([1.0], 1.0, 1e-5, sensitivities=[1.0, 2.0]),
            "sensitivities must hold 1 numbers, one for each part, got 2",
        ),
        (lambda: uniform(0.0, 1e-5, 2), "epsilon must be a finite number > 0"),
        (lambda: uniform(1.0, 1e-5, 0), "parts must be an integer >= 1, got 0"),
        (lambda: uniform(1.0, 1e-5, 2, mechanism="exact"), "mechanism must be one of"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call: Any, message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        call()


def test_an_allocation_survives_json() -> None:
    for found in (
        by_epsilons([1.0, math.inf], 1e-5, allow_infinite=True),
        uniform(1.0, 0.0, 3, mechanism="laplace"),
        importance_based([1.0, 2.0], 1.0, 1e-5),
    ):
        assert Allocation.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
