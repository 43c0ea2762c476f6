from __future__ import annotations

import math

import numpy as np
import pytest
from closed_forms import fixed_size_delta, poisson_delta

from dpfa_accounting import sampled_replace
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.events import Event, FixedSizeSampled, Gaussian, Laplace, PoissonSampled

INTERVAL = 1e-3


def pld(event: Event, count: int = 1) -> PldAccountant:
    return PldAccountant(value_discretization_interval=INTERVAL).compose(event, count)


def opposite(q: float, z: float, count: int, epsilon: float) -> float:
    """A lower bound: a record at +1/2 is replaced by one at -1/2, around its absence; losses rounded down."""
    x = np.linspace(-12 * z - 1, 12 * z + 1, 200_001)

    def density(centre: float) -> np.ndarray:
        return (1 - q) * np.exp(-((x / z) ** 2) / 2) + q * np.exp(-(((x - centre) / z) ** 2) / 2)

    mass, step = density(0.5), 1e-3
    index = np.floor(np.log(mass / density(-0.5)) / step).astype(int)
    lowest = int(index.min())
    one = np.bincount(index - lowest, mass / mass.sum())
    total = one
    for _ in range(count - 1):
        total = np.convolve(total, one)
    loss = (np.arange(len(total)) + count * lowest) * step
    above = loss > epsilon
    return float((total[above] * -np.expm1(epsilon - loss[above])).sum()) - 1e-9


@pytest.mark.parametrize(("q", "z"), [(0.01, 0.6), (0.3, 1.0), (0.9, 0.5), (0.9, 2.0)])
def test_one_release_meets_the_pair_that_reaches_it(q: float, z: float) -> None:
    """Others that all lie at one end make the absent record like one of the two."""
    events = (PoissonSampled(q, Gaussian(z), "replace"), FixedSizeSampled(int(q * 100), 100, Gaussian(z)))
    for event in events:
        for epsilon in (0.0, 0.05, 0.5, 2.0):
            # the pair in one order; under add_or_remove the other order may be the worse one only below epsilon = 0
            exact = float(poisson_delta(max(epsilon, 1e-12), q, z))
            assert exact * (1 - 1e-9) <= pld(event).delta(epsilon) <= exact * (1 + 1e-3) + 1e-6
            assert fixed_size_delta(epsilon, q, z) <= pld(event).delta(epsilon)


def test_doubling_the_sensitivity_is_below_the_truth_and_this_is_not() -> None:
    """q = 0.9, two steps, noise half of what a replaced record moves."""
    reached = opposite(0.9, 0.5, 2, 0.0)
    doubled = pld(PoissonSampled(0.9, Gaussian(0.5)), 2).delta(0.0)
    assert doubled < reached - 0.004
    assert reached <= pld(PoissonSampled(0.9, Gaussian(0.5), "replace"), 2).delta(0.0)


@pytest.mark.parametrize(("q", "z", "count"), [(0.3, 1.0, 3), (0.9, 1.0, 3), (0.5, 2.0, 5)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_compositions_are_never_below_known_pairs(q: float, z: float, count: int, epsilon: float) -> None:
    found = pld(PoissonSampled(q, Gaussian(z), "replace"), count).delta(epsilon)
    assert opposite(q, z, count, epsilon) <= found
    # neighbours that differ by a removed record only, in either order
    assert found >= pld(PoissonSampled(q, Gaussian(z)), count).delta(epsilon) * (1 - 1e-3) - 1e-6


@pytest.mark.parametrize("inner", [Gaussian(0.7), Gaussian(3.0), Laplace(0.8), Laplace(5.0)])
@pytest.mark.parametrize("part", [1e-6, 0.05, 0.6, 1.0])
def test_the_profile_is_that_of_some_pair(inner: Gaussian | Laplace, part: float) -> None:
    """In e**epsilon it is convex, falls, and is above 0 and 1 - e**epsilon, also across 0."""
    up = np.linspace(0.0, 3.0, 400)
    right = sampled_replace.delta(up, part, inner)
    left = 1 - np.exp(-up) + np.exp(-up) * right
    at, profile = np.exp(np.concatenate((-up[:0:-1], up))), np.concatenate((left[:0:-1], right))
    slopes = np.diff(profile) / np.diff(at)
    assert np.all(np.diff(slopes) >= -1e-11)
    assert np.all(profile >= np.maximum(0.0, 1 - at) - 1e-15)


def test_laplace_is_never_below_its_closed_form() -> None:
    book = pld(FixedSizeSampled(30, 100, Laplace(1.0)))
    for epsilon in (0.0, 0.1, 0.3):
        exact = 0.3 * -math.expm1((math.log1p(math.expm1(epsilon) / 0.3) - 1.0) / 2)
        assert exact <= book.delta(epsilon) <= exact + 1e-3
    assert book.epsilon(1e-6) <= math.log1p(0.3 * math.expm1(1.0)) + INTERVAL


def test_it_is_tighter_than_rdp_for_a_long_training() -> None:
    event = FixedSizeSampled(256, 60_000, Gaussian(1.1))
    spent = PldAccountant().compose(event, 14_062).epsilon(1e-5)
    assert spent == pytest.approx(3.06856, abs=1e-4)
    assert spent < 0.6 * RdpAccountant().compose(event, 14_062).epsilon(1e-5)
