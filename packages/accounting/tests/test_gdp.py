from __future__ import annotations

import math

import mpmath
import pytest
from closed_forms import gaussian_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_accounting.gdp import GdpAccountant, gdp_delta
from dpfa_core.events import Gaussian
from dpfa_core.registry import ACCOUNTANTS


@settings(max_examples=60, deadline=None)
@given(st.floats(0.0, 60.0), st.floats(1e-3, 40.0))
def test_delta_is_an_upper_bound(epsilon: float, mu: float) -> None:
    exact, bound = gaussian_delta(epsilon, mu), gdp_delta(epsilon, mu)
    assert exact <= bound + mpmath.mpf(10) ** -300
    assert bound <= exact * (1 + 1e-6) + mpmath.mpf(10) ** -16


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 50.0), st.integers(1, 50)), min_size=1, max_size=3), st.floats(-12.0, -1.0))
def test_epsilon_is_least_and_rounded_up(parts: list[tuple[float, int]], log10_delta: float) -> None:
    delta, account = 10.0**log10_delta, GdpAccountant()
    for multiplier, count in parts:
        account.compose(Gaussian(multiplier), count)
    epsilon = account.epsilon(delta)
    mu = mpmath.sqrt(sum(count / mpmath.mpf(multiplier) ** 2 for multiplier, count in parts))
    assert gaussian_delta(epsilon, mu) <= delta
    if epsilon > 0:
        assert gaussian_delta(epsilon * (1 - 1e-7), mu) > delta


def test_delta_zero_is_infinite_and_a_large_delta_free() -> None:
    account = GdpAccountant().compose(Gaussian(10.0))
    assert account.epsilon(0.0) == math.inf
    assert account.epsilon(0.5) == 0.0
    assert account.delta(account.epsilon(1e-6)) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize(("multiplier", "count", "delta"), [(0.5, 1, 1e-5), (8.0, 50, 1e-6), (30.0, 4, 1e-3)])
def test_no_valid_bound_lies_below_the_exact_one(multiplier: float, count: int, delta: float) -> None:
    exact = GdpAccountant().compose(Gaussian(multiplier), count)
    for name in ("rdp", "pld", "prv"):
        other = ACCOUNTANTS.create(name).compose(Gaussian(multiplier), count)
        assert other.epsilon(delta) >= exact.epsilon(delta) * (1 - 1e-9)
        assert other.delta(0.5) >= exact.delta(0.5) * (1 - 1e-9)
