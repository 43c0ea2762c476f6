from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_accounting import black_box
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.events import (
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    SelfComposed,
)


@settings(deadline=None, max_examples=100)
@given(
    st.floats(1e-300, 600.0),
    st.floats(0.0, 0.99),
    st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
)
def test_both_theorems_are_rounded_up(epsilon: float, delta: float, sizes: tuple[int, int]) -> None:
    inner, share = EpsilonDelta(epsilon, delta), sizes[0] / sizes[1]
    for event, exact_share in (
        (PoissonSampled(share, inner), mpmath.mpf(share)),
        (FixedSizeSampled(*sizes, inner), mpmath.mpf(sizes[0]) / sizes[1]),
    ):
        found = black_box.amplified(event, [(inner, 1)])
        assert isinstance(found, EpsilonDelta)
        with mpmath.workdps(400):
            exact = mpmath.log(1 + exact_share * mpmath.expm1(mpmath.mpf(epsilon)))
            assert exact <= found.epsilon <= exact * (1 + mpmath.mpf("1e-12"))
            assert exact_share * mpmath.mpf(delta) <= found.delta


def test_the_theorem_is_reached_by_a_sampled_randomised_response() -> None:
    """A record that is not drawn leaves a fixed answer, the one that tells most."""
    p, q = 0.4, 0.3
    own, other = 1 - p / 2, p / 2
    exact = math.log((q * own + (1 - q) * other) / other)
    spent = RdpAccountant().compose(PoissonSampled(q, RandomizedResponse(p, 2))).epsilon(0.0)
    assert exact <= spent <= exact * (1 + 1e-9)


def test_what_one_sample_answers_is_added_before_it_is_amplified() -> None:
    parts = Composed((Laplace(4.0), SelfComposed(Exponential(0.125), 2), EpsilonDelta(0.5, 1e-7)))
    whole = PldAccountant().compose(PoissonSampled(0.2, parts))
    assert whole.epsilon(3e-8) == pytest.approx(math.log1p(0.2 * math.expm1(1.0)), abs=2e-4)
    assert whole.epsilon(1.9e-8) == math.inf


@pytest.mark.parametrize(
    "event", [PoissonSampled(0.2, Exponential(0.5)), FixedSizeSampled(2, 10, RandomizedResponse(0.7, 3))]
)
def test_rdp_and_pld_price_the_same_black_box(event: Event) -> None:
    pld, rdp = (accountant().compose(event, 30).epsilon(1e-6) for accountant in (PldAccountant, RdpAccountant))
    assert pld <= rdp * (1 + 1e-2)
    assert "by the general amplification theorem" in PldAccountant().remarks(event)[0]


def test_under_the_other_relation_a_sample_is_not_amplified() -> None:
    spent = RdpAccountant().compose(PoissonSampled(0.01, Exponential(0.5), "replace")).epsilon(0.0)
    assert spent == pytest.approx(0.5)
    assert "without amplification" in RdpAccountant().remarks(PoissonSampled(0.01, Exponential(0.5), "replace"))[0]


@pytest.mark.parametrize("inner", [DiscreteGaussian(2.0), Composed((Gaussian(3.0), Laplace(2.0)))])
def test_what_no_theorem_amplifies_costs_what_it_costs_whole(inner: Event) -> None:
    for sampled in (PoissonSampled(0.1, inner), FixedSizeSampled(1, 10, inner)):
        assert RdpAccountant().compose(sampled, 4).epsilon(1e-6) == RdpAccountant().compose(inner, 4).epsilon(1e-6)


def test_a_release_that_may_fail_is_a_pure_one_and_its_delta() -> None:
    """RDP's way; PLD knows the joint distribution of failures."""
    event, count = EpsilonDelta(0.1, 1e-8), 40
    rdp, pld = RdpAccountant().compose(event, count), PldAccountant().compose(event, count)
    pure = RdpAccountant().compose(EpsilonDelta(0.1, 0.0), count)
    assert rdp.epsilon(1e-5) == pytest.approx(pure.epsilon(1e-5 - 4e-7), rel=1e-9)
    assert pld.epsilon(1e-5) <= rdp.epsilon(1e-5)
    assert rdp.epsilon(3e-7) == math.inf


def test_sums_without_a_guarantee_are_not_private() -> None:
    assert black_box.amplified(PoissonSampled(0.5, NonPrivate()), [(EpsilonDelta(0.1, 0.5), 2)]) == NonPrivate()
    book = RdpAccountant().compose(PoissonSampled(0.5, SelfComposed(EpsilonDelta(0.1, 0.5), 2)))
    assert book.epsilon(0.9) == math.inf
    assert book.delta(9.0) == 1.0
