from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Laplace as LaplaceEvent
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.laplace import Laplace
from dpfa_mechanisms.sensitivity import sensitivity

PROBLEM = AttentionProblem(batch=2, q_len=3, kv_len=3, q_heads=2, kv_heads=2, head_dim=4, clip_norm=0.5)
SPEC = PrivacySpec(epsilon=0.7, delta=0.0, unit="sequence")


@given(st.floats(1e-6, 1e6))
def test_multiplier_keeps_epsilon_exactly(epsilon: float) -> None:
    multiplier = Laplace().calibrate(epsilon, 0.0)
    assert 1 / Fraction(multiplier) <= Fraction(epsilon)
    assert multiplier <= 1 / epsilon * (1 + 1e-15)


def test_pure_epsilon_needs_no_delta() -> None:
    assert Laplace().supports(SPEC, PROBLEM) == ()


def test_plan_is_in_l1() -> None:
    laplace = Laplace()
    bound = sensitivity(SPEC, PROBLEM, laplace.norm)
    assert bound.value == pytest.approx(2 * 0.5 * 3 * 2, rel=1e-5)
    plan = laplace.plan(bound, (2.0,), PROBLEM)
    assert (plan.distribution, plan.norm) == ("laplace", "l1")
    assert plan.head_scale[0] == pytest.approx(2.0 * bound.value, rel=1e-6)
    # l1 sensitivities of heads add up, so one head has its share of the whole
    assert laplace.plan(bound, (2.0, 4.0), PROBLEM).head_scale == pytest.approx(
        (bound.value, 2.0 * bound.value), rel=1e-6
    )


def test_bad_parameters_are_refused() -> None:
    for epsilon in (0.0, math.inf, math.nan):
        with pytest.raises(PrivacyParameterError, match="epsilon must be a finite number > 0"):
            Laplace().calibrate(epsilon, 0.0)
    with pytest.raises(PrivacyParameterError, match=r"delta must be in \[0, 1\)"):
        Laplace().calibrate(1.0, 1.0)


def test_registry_creates_it_by_name() -> None:
    laplace = MECHANISMS.create("laplace")
    assert isinstance(laplace, Laplace)
    assert laplace.event(2.0) == LaplaceEvent(2.0)
    assert laplace.claims()
