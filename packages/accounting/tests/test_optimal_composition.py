from __future__ import annotations

import itertools
import math

import mpmath
import pytest

from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.optimal_composition import OptimalComposition
from dpfa_accounting.pld import PldAccountant
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import EpsilonDelta, Gaussian


def theorem_3_3(epsilon: float, base: float, delta: float, count: int) -> mpmath.mpf:
    """Kairouz, Oh & Viswanath in 80 digits, written as in the paper."""
    with mpmath.workdps(80):
        e0, e = mpmath.mpf(base), mpmath.mpf(epsilon)
        terms = (
            mpmath.binomial(count, i) * max(mpmath.mpf(0), mpmath.exp((count - i) * e0) - mpmath.exp(e + i * e0))
            for i in range(count + 1)
        )
        excess = mpmath.fsum(terms) / (1 + mpmath.exp(e0)) ** count
        return 1 - (1 - mpmath.mpf(delta)) ** count * (1 - excess)


def every_outcome(epsilon: float, bases: list[float]) -> float:
    """Delta of different randomised responses, summed over all 2**n outcomes."""
    total = 0.0
    for signs in itertools.product((1, -1), repeat=len(bases)):
        loss = math.fsum(sign * base for sign, base in zip(signs, bases, strict=True))
        mass = math.prod(1 / (1 + math.exp(-sign * base)) for sign, base in zip(signs, bases, strict=True))
        total += mass * max(0.0, -math.expm1(epsilon - loss))
    return total


@pytest.mark.parametrize(
    ("base", "delta", "count"), [(0.1, 0.0, 100), (1.0, 1e-7, 7), (0.01, 1e-9, 500), (3.0, 0.0, 1)]
)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.77, 0.97])
def test_equal_releases_meet_the_theorem_from_above(base: float, delta: float, count: int, share: float) -> None:
    epsilon = share * base * count
    found, exact = (
        OptimalComposition([(EpsilonDelta(base, delta), count)]).delta(epsilon),
        theorem_3_3(epsilon, base, delta, count),
    )
    assert found >= exact
    assert found <= exact * (1 + 1e-9) + 1e-290


def test_a_hundred_thousand_releases_keep_the_theorem_and_gain_little_above_it() -> None:
    composed = OptimalComposition([(EpsilonDelta(0.01, 1e-12), 100_000)])
    epsilon = composed.epsilon(1e-5)
    # the sum of losses is all but normal: mean k e tanh(e/2), variance about k e**2
    normal = GdpAccountant().compose(Gaussian(1.0 / (0.01 * math.sqrt(100_000)))).epsilon(1e-5)
    assert epsilon == pytest.approx(normal, rel=1e-3)
    assert composed.delta(epsilon) <= 1e-5 < composed.delta(epsilon * (1 - 1e-9))


@pytest.mark.parametrize("bases", [[0.5, 0.3, 0.2, 1.1], [0.01, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]])
def test_different_releases_are_never_below_every_outcome_summed(bases: list[float]) -> None:
    composed = OptimalComposition([EpsilonDelta(base, 0.0) for base in bases])
    for share in (0.0, 0.05, 0.2, 0.5, 0.9, 0.999):
        epsilon = share * sum(bases)
        exact = every_outcome(epsilon, bases)
        assert exact <= composed.delta(epsilon) <= exact * 1.001 + 1e-6


def test_different_releases_agree_with_another_library_and_equal_ones_with_their_own_sum() -> None:
    parts = [(EpsilonDelta(0.1, 0.0), 100), (EpsilonDelta(0.033, 1e-9), 1000), (EpsilonDelta(0.5, 1e-8), 3)]
    pld = PldAccountant()
    for event, count in parts:
        pld.compose(event, count)
    assert OptimalComposition(parts).epsilon(1e-5) == pytest.approx(pld.epsilon(1e-5), rel=1e-4)
    split = OptimalComposition([(EpsilonDelta(0.1, 0.0), 30), (EpsilonDelta(0.1 * (1 + 1e-12), 0.0), 70)])
    whole = OptimalComposition([(EpsilonDelta(0.1, 0.0), 100)])
    assert whole.epsilon(1e-6) <= split.epsilon(1e-6) <= whole.epsilon(1e-6) * 1.001


def test_a_hundred_different_releases_lie_between_the_least_and_the_largest() -> None:
    bases = [0.05 * (1 + i / 100) for i in range(100)]
    found = OptimalComposition([EpsilonDelta(base, 0.0) for base in bases]).epsilon(1e-8)
    low, high = (OptimalComposition([(EpsilonDelta(base, 0.0), 100)]).epsilon(1e-8) for base in (0.05, 0.1))
    assert low < found < high
    assert found <= sum(bases)


def test_pure_epsilon_adds_up_and_deltas_that_exceed_the_target_have_none() -> None:
    assert OptimalComposition([(EpsilonDelta(0.1, 0.0), 10)]).epsilon(0.0) == pytest.approx(1.0, rel=1e-12)
    assert OptimalComposition([(EpsilonDelta(0.1, 0.0), 10)]).epsilon(0.0) >= 1.0
    failing = OptimalComposition([(EpsilonDelta(0.1, 1e-6), 10)])
    assert failing.epsilon(9.9e-6) == math.inf
    assert failing.epsilon(1.1e-5) < 1.0 + 1e-12
    assert failing.failure == pytest.approx(1e-5, rel=1e-5)
    assert OptimalComposition([]).epsilon(1e-5) == 0.0
    assert OptimalComposition([EpsilonDelta(0.0, 1e-6)]).epsilon(1e-5) == 0.0


def test_what_is_no_black_box_or_no_target_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="optimal composition takes EpsilonDelta events, got Gaussian"):
        OptimalComposition([Gaussian(1.0)])  # type: ignore[list-item]
    with pytest.raises(PrivacyParameterError, match="count must be an integer >= 1, got 0"):
        OptimalComposition([(EpsilonDelta(1.0, 0.0), 0)])
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(PrivacyParameterError, match="delta must be in"):
            OptimalComposition([EpsilonDelta(1.0, 0.0)]).epsilon(bad)
