from __future__ import annotations

import math

import mpmath
import pytest

from dpfa_accounting import truncation
from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.errors import UnsupportedEvent
from dpfa_core.events import FixedSizeSampled, Gaussian, Laplace, PoissonSampled, TruncatedPoisson

PLAIN = PoissonSampled(0.1, Gaussian(2.0))


def cut(max_batch: int, relation: str = "add_or_remove") -> TruncatedPoisson:
    return TruncatedPoisson(0.1, max_batch, 500, Gaussian(2.0), relation)


def tail(max_batch: int, population: int, q: float) -> mpmath.mpf:
    with mpmath.workdps(50):
        p = mpmath.mpf(q)
        return mpmath.fsum(
            mpmath.binomial(population, k) * p**k * (1 - p) ** (population - k)
            for k in range(max_batch + 1, population + 1)
        )


@pytest.mark.parametrize("max_batch", [50, 80, 120, 300])
@pytest.mark.parametrize("relation", ["add_or_remove", "replace"])
def test_the_chance_of_a_cut_is_rounded_up(max_batch: int, relation: str) -> None:
    exact = tail(max_batch, 501 if relation == "add_or_remove" else 500, 0.1)
    found = truncation.overflow(cut(max_batch, relation))
    assert exact <= found <= exact * (1 + mpmath.mpf("1e-7")) + mpmath.mpf("1e-320")


@pytest.mark.parametrize("accountant", [RdpAccountant, PldAccountant, PrvAccountant])
@pytest.mark.parametrize("max_batch", [85, 95, 110])
def test_epsilon_leaves_room_for_the_cuts(accountant: type, max_batch: int) -> None:
    book, plain = accountant().compose(cut(max_batch), 20), accountant().compose(PLAIN, 20)
    epsilon = book.epsilon(1e-5)
    if epsilon < math.inf:
        room = 1e-5 - (1 + math.exp(epsilon)) * 20 * float(tail(max_batch, 501, 0.1))
        assert plain.epsilon(1e-5) <= plain.epsilon(room) <= epsilon <= plain.epsilon(room) * (1 + 1e-6) + 1e-9
    cuts = 20 * float(tail(max_batch, 501, 0.1))
    at = [plain.delta(e) + (1 + math.exp(e)) * cuts for e in (0.5, 1.0, 1.5, 2.0)]
    assert plain.delta(2.0) + 2 * cuts <= book.delta(2.0) <= min(at) * (1 + 1e-6)


def test_cuts_that_are_too_likely_leave_no_guarantee() -> None:
    book = RdpAccountant().compose(cut(60), 20)
    assert book.epsilon(1e-5) == math.inf
    assert book.delta(500.0) == 1.0
    # the cuts weigh less at a smaller epsilon, whose guarantee holds at a larger one too
    rarer = RdpAccountant().compose(cut(90), 20)
    assert 20 * float(tail(90, 501, 0.1)) < rarer.delta(500.0) == rarer.delta(1e300) < 0.1
    assert "with the chance of a cut added to delta" in book.remarks(cut(60))[0]


def test_a_batch_that_holds_everybody_is_never_cut() -> None:
    for event in (cut(501), cut(500, "replace")):
        plain = PoissonSampled(0.1, Gaussian(2.0), event.relation)
        assert PldAccountant().compose(event).epsilon(1e-5) == PldAccountant().compose(plain).epsilon(1e-5)
        assert PldAccountant().remarks(event) == ()
    # a neighbour with one record more could be cut
    assert 0 < truncation.overflow(TruncatedPoisson(0.5, 6, 6, Gaussian(1.0))) == pytest.approx(2.0**-7)


def test_the_relation_and_the_inner_release_are_those_of_plain_sampling() -> None:
    replaced = cut(200, "replace")
    assert PldAccountant().compose(replaced, 5).epsilon(1e-5) == pytest.approx(
        PldAccountant().compose(PoissonSampled(0.1, Gaussian(2.0), "replace"), 5).epsilon(1e-5), rel=1e-6
    )
    with pytest.raises(UnsupportedEvent, match=r"got relation='replace'.*use pld"):
        RdpAccountant().compose(replaced)
    with pytest.raises(UnsupportedEvent, match="GDP is exact"):
        GdpAccountant().compose(cut(200))
    pure = RdpAccountant().compose(TruncatedPoisson(0.1, 200, 500, Laplace(2.0)))
    assert pure.epsilon(1e-6) == pytest.approx(math.log1p(0.1 * math.expm1(0.5)), rel=1e-6)
    assert pure.supports(FixedSizeSampled(3, 9, cut(200)))
