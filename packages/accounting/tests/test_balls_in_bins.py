from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import logsumexp

from dpfa_accounting import balls_in_bins
from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant
from dpfa_accounting.rdp import ORDERS, RdpAccountant
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import BallsInBins, Gaussian, Laplace, PoissonSampled

ROUND = np.array([2.0, 3.0, 4.0, 7.0])


def quadrature(z: float, bins: int, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of one round, removing and adding, by a sum over a grid of the outputs of all bins."""
    step = 0.1
    y = np.arange(-30.0, 30.0 + 8.0 / z, step)
    log_mass = -y * y / 2 + math.log(step / math.sqrt(2 * math.pi))
    log_w = y / z - 0.5 / z**2
    axes = np.meshgrid(*[np.arange(len(y))] * bins, indexing="ij", sparse=True)
    mass = sum(log_mass[axis] for axis in axes)
    ratio = logsumexp(np.stack(np.broadcast_arrays(*[log_w[axis] for axis in axes])), axis=0) - math.log(bins)
    removed = np.array([logsumexp(mass + a * ratio) / (a - 1) for a in orders])
    added = np.array([logsumexp(mass - (a - 1) * ratio) / (a - 1) for a in orders])
    return removed, added


@pytest.mark.parametrize("z", [0.7, 1.0, 3.0])
def test_two_bins_meet_the_quadrature_in_both_directions(z: float) -> None:
    removed, added = quadrature(z, 2, ROUND)
    at = ROUND.astype(int) - 1
    assert balls_in_bins._removed(z, 2)[at] / at == pytest.approx(removed, rel=1e-9)
    assert balls_in_bins._added(z, 2)[at] / at == pytest.approx(added, rel=1e-9)
    found = balls_in_bins.curve(z, 2, ROUND)
    assert np.all(found >= np.maximum(removed, added) * (1 - 1e-12))


def test_three_bins_agree_with_drawn_outputs() -> None:
    z, bins, x = 1.5, 3, np.random.default_rng(0).standard_normal((400_000, 3))
    ratio = np.exp(x / z - 0.5 / z**2).mean(axis=1)
    for order in (2, 3):
        for moment, found in (
            (ratio**order, balls_in_bins._removed(z, bins)),
            (ratio ** (1 - order), balls_in_bins._added(z, bins)),
        ):
            assert np.exp(found[order - 1]) == pytest.approx(moment.mean(), abs=5 * moment.std() / len(x) ** 0.5)


@pytest.mark.parametrize("z", [0.3, 1.0, 5.0])
def test_one_bin_is_no_sample(z: float) -> None:
    s = np.arange(balls_in_bins.LARGEST_ORDER)
    exact = s * (s + 1) / (2 * z * z)
    assert balls_in_bins._removed(z, 1) == pytest.approx(exact, rel=1e-9, abs=1e-10)
    assert balls_in_bins._added(z, 1) == pytest.approx(exact, rel=1e-9, abs=1e-10)
    by_integral = balls_in_bins._by_laplace_transform(s.astype(float), z, 1)
    known = np.isfinite(by_integral)
    assert known.sum() > 3
    assert by_integral[known] == pytest.approx(exact[known], rel=1e-9, abs=1e-10)


def test_the_integral_keeps_the_inequality_of_means() -> None:
    s = np.arange(200.0)
    for z, bins in ((0.5, 2), (1.0, 10), (2.0, 300)):
        by_integral = balls_in_bins._by_laplace_transform(s, z, bins)
        finite = np.isfinite(by_integral)
        assert np.all(by_integral[finite] <= (s * (1 + s / bins) / (2 * z * z))[finite] + 1e-9)


def test_logarithms_of_moments_are_convex_and_fractional_orders_lie_above() -> None:
    """So that a straight line between two integers is a bound."""
    z, bins = 1.0, 2
    between = np.array([1.5, 2.5, 6.5])
    removed, added = quadrature(z, bins, between)
    assert np.all(balls_in_bins.curve(z, bins, between) >= np.maximum(removed, added))


@pytest.mark.parametrize(("z", "bins"), [(0.6, 2), (1.0, 30), (1.1, 234), (4.0, 1000)])
def test_bins_help_and_more_of_them_help_more(z: float, bins: int) -> None:
    few, many = balls_in_bins.curve(z, bins, ORDERS), balls_in_bins.curve(z, 4 * bins, ORDERS)
    assert np.all(many <= few * (1 + 1e-9) + 1e-10)
    assert np.all(few <= ORDERS / (2 * z * z) * (1 + 1e-15))
    assert few[9] < 0.9 * ORDERS[9] / (2 * z * z)


def test_an_epoch_costs_about_what_poisson_sampling_does() -> None:
    bins = RdpAccountant().compose(BallsInBins(234, 60, Gaussian(1.1))).epsilon(1e-5)
    poisson = RdpAccountant().compose(PoissonSampled(1 / 234, Gaussian(1.1)), 60 * 234).epsilon(1e-5)
    assert bins == pytest.approx(poisson, rel=0.05)


@pytest.mark.parametrize("relation", ["add_or_remove", "replace"])
def test_others_price_the_rounds_without_amplification(relation: str) -> None:
    event, plain = BallsInBins(8, 6, Gaussian(3.0), relation), GdpAccountant().compose(Gaussian(3.0), 6)
    for accountant in (PldAccountant, PrvAccountant):
        spent = accountant().compose(event).epsilon(1e-5)
        assert plain.epsilon(1e-5) <= spent <= plain.epsilon(1e-5) + 0.02
        assert "BallsInBins around Gaussian is priced without amplification" in accountant().remarks(event)[0]
    assert RdpAccountant().remarks(BallsInBins(8, 6, Gaussian(3.0))) == ()
    with pytest.raises(UnsupportedEvent, match="GDP is exact"):
        GdpAccountant().compose(event)
    pure = RdpAccountant().compose(BallsInBins(8, 6, Laplace(3.0), relation)).epsilon(0.0)
    assert pure == pytest.approx(2.0)
