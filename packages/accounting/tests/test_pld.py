from __future__ import annotations

import math

import pytest
from closed_forms import poisson_delta

from dpfa_accounting.pld import PldAccountant
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import EpsilonDelta, Exponential, Gaussian, Laplace, PoissonSampled


@pytest.mark.parametrize(
    ("q", "sigma", "epsilon"), [(0.01, 0.6, 0.5), (0.1, 1.0, 0.05), (0.5, 2.0, 0.3), (0.9, 1.0, 2.0)]
)
def test_one_sampled_step_is_never_below_the_closed_form_and_close_to_it(
    q: float, sigma: float, epsilon: float
) -> None:
    exact = float(poisson_delta(epsilon, q, sigma))
    found = PldAccountant().compose(PoissonSampled(q, Gaussian(sigma))).delta(epsilon)
    assert exact <= found <= exact * (1 + 1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_laplace_is_never_below_its_closed_form(share: float) -> None:
    found = PldAccountant().compose(Laplace(2.0)).delta(share / 2)
    exact = -math.expm1((share / 2 - 0.5) / 2)
    assert exact <= found <= exact * (1 + 1e-3)


def test_splitting_an_l1_move_over_numbers_costs_less() -> None:
    """Why one Laplace event may stand for noise on many numbers."""
    whole = PldAccountant().compose(Laplace(1.0))
    for parts in (2, 5):
        split = PldAccountant().compose(Laplace(float(parts)), parts)
        for epsilon in (0.0, 0.2, 0.5, 0.9):
            assert split.delta(epsilon) <= whole.delta(epsilon)


def test_epsilon_delta_releases_add_up_to_at_most_the_sums() -> None:
    one = PldAccountant().compose(EpsilonDelta(0.5, 1e-6))
    assert one.epsilon(1.01e-6) == pytest.approx(0.5, rel=1e-3)
    assert one.epsilon(0.9e-6) == math.inf
    three = PldAccountant().compose(EpsilonDelta(0.5, 1e-6)).compose(Exponential(0.25), 2)
    assert 0.5 < three.epsilon(1.01e-6) <= 1.0 * (1 + 1e-3)


def test_sampled_laplace_is_amplified() -> None:
    sampled = PldAccountant().compose(PoissonSampled(0.01, Laplace(1.0)), 10).epsilon(1e-6)
    assert 0 < sampled < 10 * math.log1p(0.01 * math.expm1(1.0)) * (1 + 1e-3)


@pytest.mark.parametrize(("count", "delta", "least"), [(1, 1e-13, "1e-09"), (2_000_000, 5e-9, "7.11e-09")])
def test_deltas_lost_in_round_off_are_refused(count: int, delta: float, least: str) -> None:
    account = PldAccountant().compose(PoissonSampled(0.001, Gaussian(2.0)), count)
    with pytest.raises(UnsupportedEvent, match=f"PLD by FFT needs delta >= {least} for {count} releases"):
        account.epsilon(delta)


def test_small_noise_coarsens_the_grid_and_only_adds() -> None:
    """Without the guard this would ask for a grid of 10**9 points."""
    sharp = PldAccountant().compose(PoissonSampled(0.5, Gaussian(0.05)), 200).epsilon(1e-5)
    assert 200 * 0.5 * 200 * 0.9 < sharp < 200 * (200 + 100)


def test_a_finer_grid_is_tighter() -> None:
    event, count = PoissonSampled(1e-4, Gaussian(1.0)), 1000
    default, fine = PldAccountant(), PldAccountant(value_discretization_interval=2e-5)
    assert fine.compose(event, count).epsilon(1e-6) < default.compose(event, count).epsilon(1e-6)
    with pytest.raises(PrivacyParameterError, match="value_discretization_interval must be a finite number > 0"):
        PldAccountant(value_discretization_interval=0.0)
