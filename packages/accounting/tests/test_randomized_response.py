from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant as LibraryPld

from dpfa_accounting import randomized_response
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.events import Composed, RandomizedResponse, SelfComposed

FIVE = SelfComposed(RandomizedResponse(0.5, 2), 5)


def laws(p: float, k: int) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """The answers of two records, written out."""
    p = mpmath.mpf(p)
    other = p / k
    own = 1 - p + other
    return [own] + [other] * (k - 1), [other, own] + [other] * (k - 2)


@pytest.mark.parametrize(("p", "k"), [(0.5, 2), (0.1, 3), (0.9, 17), (1e-6, 4), (0.999, 2)])
def test_the_curve_is_the_divergence_of_the_answers(p: float, k: int) -> None:
    orders = np.array([1.1, 2.0, 7.5, 64.0, 1024.0])
    with mpmath.workdps(60):
        one, two = laws(p, k)
        for order, found in zip(orders, randomized_response.curve(RandomizedResponse(p, k), orders), strict=True):
            a = mpmath.mpf(float(order))
            exact = mpmath.log(sum(x**a * y ** (1 - a) for x, y in zip(one, two, strict=True))) / (a - 1)
            assert exact <= found <= exact * (1 + mpmath.mpf("1e-10")) + mpmath.mpf("1e-13")
        assert mpmath.log(one[0] / one[1]) <= randomized_response.epsilon(RandomizedResponse(p, k))


@pytest.mark.parametrize(("p", "k"), [(0.5, 2), (0.3, 5)])
def test_a_record_that_answers_uniformly_is_no_worse_a_neighbour(p: float, k: int) -> None:
    orders = np.array([1.3, 2.0, 9.0])
    own, uniform = [[float(x) for x in law] for law in (laws(p, k)[0], [mpmath.mpf(1) / k] * k)]
    bound = randomized_response.curve(RandomizedResponse(p, k), orders)
    for one, two in ((own, uniform), (uniform, own)):
        for order, most in zip(orders, bound, strict=True):
            total = sum(x**order * y ** (1 - order) for x, y in zip(one, two, strict=True))
            assert math.log(total) / (order - 1) <= most


@pytest.mark.parametrize("accountant", [RdpAccountant, PldAccountant])
def test_every_answer_of_a_self_composition_is_counted(accountant: type) -> None:
    """dp-accounting's own accountant prices five answers as one."""
    fooled = LibraryPld(NeighboringRelation.REPLACE_ONE)
    fooled.compose(dp_event.SelfComposedDpEvent(dp_event.RandomizedResponseDpEvent(0.5, 2), 5))
    assert fooled.get_epsilon(1e-5) == pytest.approx(math.log(3), abs=1e-3)
    spent = accountant().compose(FIVE).epsilon(1e-5)
    assert spent == accountant().compose(Composed((RandomizedResponse(0.5, 2),) * 5)).epsilon(1e-5)
    # at least one in 2**10 pairs of outcomes has the whole loss
    assert spent == pytest.approx(5 * math.log(3), abs=1e-3)


@pytest.mark.parametrize("accountant", [RdpAccountant, PldAccountant])
@pytest.mark.parametrize(("p", "k", "count"), [(0.5, 2, 5), (0.4, 4, 3), (0.9, 3, 6)])
def test_it_is_never_below_the_product_written_out(accountant: type, p: float, k: int, count: int) -> None:
    one, two = [[float(x) for x in law] for law in laws(p, k)]
    ones = [math.prod(outcome) for outcome in itertools.product(one, repeat=count)]
    twos = [math.prod(outcome) for outcome in itertools.product(two, repeat=count)]
    book = accountant().compose(RandomizedResponse(p, k), count)
    for epsilon in (0.0, 0.4, 1.5):
        exact = math.fsum(max(0.0, x - math.exp(epsilon) * y) for x, y in zip(ones, twos, strict=True))
        assert exact <= book.delta(epsilon) + 1e-12
        if accountant is PldAccountant:
            assert book.delta(epsilon) <= exact + 1e-3


def test_a_uniform_answer_tells_nothing() -> None:
    assert RdpAccountant().compose(RandomizedResponse(1.0, 4), 9).epsilon(0.0) == 0.0
    assert PldAccountant().compose(RandomizedResponse(1.0, 4), 9).delta(0.0) == 0.0
