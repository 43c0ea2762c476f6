from __future__ import annotations

import math

import mpmath
import pytest
from closed_forms import fixed_size_delta, poisson_delta

from dpfa_accounting.rdp import ORDERS, RdpAccountant, _curve
from dpfa_core.events import (
    Composed,
    EpsilonDelta,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    PoissonSampled,
)


def test_pure_releases_need_no_delta() -> None:
    account = RdpAccountant().compose(Composed((Laplace(2.0), Exponential(0.25), EpsilonDelta(0.125, 0.0))), 2)
    assert 1.75 <= account.epsilon(0.0) <= 1.75 * (1 + 1e-12)
    assert account.delta(1.76) == 0.0
    assert account.compose(Gaussian(1.0)).epsilon(0.0) == math.inf


def test_many_pure_releases_gain_by_a_delta() -> None:
    account = RdpAccountant().compose(Laplace(20.0), 400)
    assert account.epsilon(1e-6) < 0.5 * account.epsilon(0.0)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 4.0])
def test_pure_releases_are_never_below_the_worst_of_them(epsilon: float) -> None:
    """Binary randomised response has the largest divergence of all pure mechanisms."""
    for order, bound in zip(ORDERS, _curve(EpsilonDelta(epsilon, 0.0)), strict=True):
        with mpmath.workdps(60):
            a, e = mpmath.mpf(order), mpmath.mpf(epsilon)
            exact = mpmath.log((mpmath.exp(a * e) + mpmath.exp((1 - a) * e)) / (1 + mpmath.exp(e))) / (a - 1)
        assert exact <= bound


def test_a_sample_of_everybody_adds_to_its_like() -> None:
    account = RdpAccountant().compose(Laplace(2.0)).compose(PoissonSampled(1.0, Laplace(2.0)))
    assert account.epsilon(0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("b", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_laplace_is_never_below_its_closed_form(b: float, share: float) -> None:
    epsilon = share / b
    exact = -math.expm1((epsilon - 1 / b) / 2)
    assert RdpAccountant().compose(Laplace(b)).delta(epsilon) >= exact


@pytest.mark.parametrize("q", [1e-9, 1e-4, 0.1, 0.9])
@pytest.mark.parametrize("sigma", [0.6, 2.0])
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 2.0])
def test_poisson_sampling_is_never_below_one_exact_step(q: float, sigma: float, epsilon: float) -> None:
    bound = RdpAccountant().compose(PoissonSampled(q, Gaussian(sigma))).delta(epsilon)
    assert bound >= poisson_delta(epsilon, q, sigma)


@pytest.mark.parametrize(("size", "population"), [(1, 1000), (20, 100), (90, 100)])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_fixed_size_sampling_is_never_below_a_real_pair(size: int, population: int, sigma: float) -> None:
    account = RdpAccountant().compose(FixedSizeSampled(size, population, Gaussian(sigma)))
    for epsilon in (0.1, 1.0, 3.0):
        assert account.delta(epsilon) >= fixed_size_delta(epsilon, size / population, sigma)


def test_fixed_size_sampling_amplifies() -> None:
    sampled = RdpAccountant().compose(FixedSizeSampled(1, 100, Gaussian(1.0)), 10).epsilon(1e-6)
    assert 0 < sampled < RdpAccountant().compose(Gaussian(1.0), 10).epsilon(1e-6)


def test_tiny_divergences_are_not_read_as_none() -> None:
    """float64 noise can make the divergence of a rare sample negative; it still costs something."""
    account = RdpAccountant().compose(PoissonSampled(1e-12, Gaussian(3.0)), 1000)
    assert account.delta(1e-9) > 0
    assert account.epsilon(1e-15) > 0


def test_orders_that_do_not_converge_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert 17 < RdpAccountant().compose(PoissonSampled(0.33, Gaussian(1.2)), 90).epsilon(1e-4) < 17.2
    assert capfd.readouterr().err == ""
