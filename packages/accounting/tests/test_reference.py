"""Published and certified values, and an independent lower estimate for sampled releases."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import privacy_loss_distribution

from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.events import Event, Gaussian, PoissonSampled

# noise multiplier, sampling probability, steps, delta, RDP, PLD, certified upper bound (on the same grid)
ROWS = [
    (0.5, 1.0, 1, 1e-5, 10.72482, 9.99726, 9.9972561503),
    (1.0, 1.0, 1, 1e-5, 4.72839, 4.37718, 4.3771781),
    (4.0, 1.0, 10, 1e-5, 3.61697, 3.34141, 3.341422),
    (8.0, 1.0, 50, 1e-6, 4.54353, 4.24855, 4.248570),
    (0.5, 1e-4, 10_000, 1e-5, 2.76382, 1.17529, 1.175290),
    (0.8, 5e-3, 1_000, 1e-6, 2.62654, 2.00411, 2.004114),
    (1.0, 0.01, 1_000, 1e-5, 2.10137, 1.82824, 1.828250),
    (1.1, 256 / 60_000, 14_062, 1e-5, 2.59656, 2.38169, 2.381700),
    (2.0, 0.1, 100, 1e-5, 2.58057, 2.33740, 2.337414),
    (1.0, 1e-4, 100_000, 1e-6, 0.61762, 0.16505, 0.165047),
]


def step(sigma: float, q: float) -> Event:
    return Gaussian(sigma) if q == 1.0 else PoissonSampled(q, Gaussian(sigma))


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "rdp", "pld", "certified"), ROWS)
def test_rdp_and_pld_give_the_reference_values(
    sigma: float, q: float, steps: int, delta: float, rdp: float, pld: float, certified: float
) -> None:
    event = step(sigma, q)
    by_rdp = RdpAccountant().compose(event, steps).epsilon(delta)
    by_pld = PldAccountant().compose(event, steps).epsilon(delta)
    assert by_rdp == pytest.approx(rdp, abs=1e-5)
    assert by_pld == pytest.approx(pld, abs=1e-5)
    # certified values are upper bounds on a slightly coarser grid
    assert min(by_rdp, by_pld) >= certified * (1 - 1e-5)


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "rdp", "pld", "certified"), ROWS[5:9])
def test_pld_is_never_below_an_optimistic_estimate(
    sigma: float, q: float, steps: int, delta: float, rdp: float, pld: float, certified: float
) -> None:
    optimistic = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, pessimistic_estimate=False, value_discretization_interval=1e-4
    )
    below = optimistic.self_compose(steps).get_epsilon_for_delta(delta)
    assert PldAccountant().compose(step(sigma, q), steps).epsilon(delta) >= below


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "rdp", "pld", "certified"), [*ROWS[:4], *ROWS[5:7], ROWS[8]])
def test_prv_is_never_below_the_certified_values(
    sigma: float, q: float, steps: int, delta: float, rdp: float, pld: float, certified: float
) -> None:
    by_prv = PrvAccountant().compose(step(sigma, q), steps).epsilon(delta)
    assert certified * (1 - 1e-6) <= by_prv <= certified + 0.02


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "rdp", "pld", "certified"), ROWS[:4])
def test_gdp_meets_the_certified_values(
    sigma: float, q: float, steps: int, delta: float, rdp: float, pld: float, certified: float
) -> None:
    exact = GdpAccountant().compose(Gaussian(sigma), steps).epsilon(delta)
    assert certified * (1 - 1e-5) <= exact <= certified * (1 + 1e-9)


def test_rdp_gives_the_first_published_dp_sgd_value() -> None:
    """q = 0.01, sigma = 4, 10,000 steps: 1.26 in Abadi et al. 2016."""
    spent = RdpAccountant().compose(PoissonSampled(0.01, Gaussian(4.0)), 10_000).epsilon(1e-5)
    assert spent <= 1.26
    assert spent == pytest.approx(1.26, rel=0.2)
    assert math.isfinite(spent)
