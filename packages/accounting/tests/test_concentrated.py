from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from dpfa_accounting import concentrated
from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant
from dpfa_accounting.rdp import ORDERS, RdpAccountant, _curve
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import Composed, DiscreteGaussian, Exponential, Gaussian


def exact(rho: float, delta: float) -> mpmath.mpf:
    """Proposition 12 of Canonne, Kamath & Steinke 2020 at its best order."""
    with mpmath.workdps(60):
        r, wanted = mpmath.mpf(rho), -mpmath.log(mpmath.mpf(delta))
        low, high = mpmath.mpf(-300), mpmath.mpf(300)
        for _ in range(140):
            middle = (low + high) / 2
            y = mpmath.exp(middle)
            low, high = (middle, high) if r * y * y + mpmath.log1p(y) < wanted else (low, middle)
        y = mpmath.exp(high)
        return r * (1 + y) + (wanted - mpmath.log1p(y)) / y + mpmath.log(y / (1 + y))


@settings(deadline=None, max_examples=20)
@given(st.floats(-8.0, 6.0), st.floats(-40.0, -1.0))
def test_epsilon_is_the_best_over_all_orders_and_rounded_up(log10_rho: float, log10_delta: float) -> None:
    rho, delta = 10.0**log10_rho, 10.0**log10_delta
    least, found = exact(rho, delta), concentrated.epsilon(rho, delta)
    if found > 0:
        assert least <= found <= least * (1 + mpmath.mpf("1e-9")) + mpmath.mpf("1e-12")
        assert concentrated.delta(rho, found) == pytest.approx(delta, rel=1e-9)


def test_small_divergences_cost_nothing_at_a_large_delta() -> None:
    assert concentrated.epsilon(1e-12, 1e-5) == 0.0
    assert concentrated.delta(1e-12, 0.0) <= 1.01e-6


@pytest.mark.parametrize("z", [0.5, 1.0, 6.0])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_a_discrete_gaussian_is_never_below_its_losses_on_a_grid(z: float, ratio: float) -> None:
    """Sensitivity 1 and a grid of 1 / k for the least k that makes deviation / grid about `ratio` or more."""
    steps = max(1, round(ratio / z))
    x = np.arange(-40 * z * steps - steps, 40 * z * steps + steps + 1).round()
    log_p = -((x / (z * steps)) ** 2) / 2
    p = np.exp(log_p) / np.exp(log_p).sum()
    q = np.exp(-(((x - steps) / (z * steps)) ** 2) / 2) / np.exp(log_p).sum()
    book = RdpAccountant().compose(DiscreteGaussian(z))
    for epsilon in (0.1, 1.0, 4.0):
        assert float(np.clip(q - math.exp(epsilon) * p, 0, None).sum()) <= book.delta(epsilon)


def test_a_discrete_gaussian_is_priced_as_concentrated_and_never_as_a_gaussian() -> None:
    both = RdpAccountant().compose(Composed((Gaussian(4.0), DiscreteGaussian(4.0))))
    assert both.epsilon(1e-6) == pytest.approx(concentrated.epsilon(2 / 32, 1e-6), rel=1e-9)
    assert len(both.state()["events"]) == 2
    assert "concentrated" in both.remarks(DiscreteGaussian(4.0))[0]
    for accountant in (GdpAccountant, PldAccountant, PrvAccountant):
        with pytest.raises(UnsupportedEvent, match=r"got DiscreteGaussian.*use rdp|depend on the grid.*use rdp"):
            accountant().compose(DiscreteGaussian(4.0))


def test_selections_have_an_eighth_of_the_square_as_their_divergence() -> None:
    """Cesar & Rogers 2021, Lemma 3.2; a pure release in general has half of it."""
    count, epsilon = 400, 0.05
    spent = RdpAccountant().compose(Exponential(epsilon), count).epsilon(1e-6)
    assert spent == pytest.approx(concentrated.epsilon(count * epsilon**2 / 8, 1e-6), rel=2e-3)
    assert RdpAccountant().compose(Exponential(epsilon), count).epsilon(0.0) == pytest.approx(20.0)


@pytest.mark.parametrize("tie", [1e-3, 0.1, 0.5])
def test_no_selection_has_more(tie: float) -> None:
    """Two neighbours whose log ratios span the whole epsilon."""
    epsilon = 1.0
    q = np.array([tie, 1 - tie])
    ratio = np.array([epsilon, 0.0]) - math.log(1 + tie * math.expm1(epsilon))
    for order, most in zip(ORDERS, _curve(Exponential(epsilon)), strict=True):
        assert logsumexp(order * ratio + np.log(q)) / (order - 1) <= most
