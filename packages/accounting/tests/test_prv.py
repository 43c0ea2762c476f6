from __future__ import annotations

import math

import numpy as np
import pytest

from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant, _Added
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import Composed, Event, Gaussian, PoissonSampled, SelfComposed

RELEASES = [
    Gaussian(1.0),
    SelfComposed(PoissonSampled(0.33, Gaussian(3.5)), 90),
    Composed((Gaussian(4.0), SelfComposed(PoissonSampled(0.01, Gaussian(1.0)), 300))),
    Composed(
        (SelfComposed(PoissonSampled(0.1, Gaussian(2.0)), 50), SelfComposed(PoissonSampled(0.02, Gaussian(1.2)), 80))
    ),
]


@pytest.mark.parametrize("event", RELEASES)
def test_its_interval_holds_the_bounds_of_the_others(event: Event) -> None:
    delta = 1e-5
    low, high = PrvAccountant().compose(event).interval(delta)
    pld, rdp = PldAccountant().compose(event).epsilon(delta), RdpAccountant().compose(event).epsilon(delta)
    assert low <= min(pld, rdp)
    # the estimate of PLD is far finer than the interval
    assert pld * (1 - 1e-3) <= high <= pld + 0.05
    assert high == PrvAccountant().compose(event).epsilon(delta)


def test_delta_answers_epsilon() -> None:
    account = PrvAccountant().compose(PoissonSampled(0.1, Gaussian(2.0)), 50)
    epsilon = account.epsilon(1e-5)
    assert account.delta(epsilon) <= 1e-5 * 1.1
    assert account.delta(0.0) > account.delta(1.0) > account.delta(100.0) > 0


def test_a_smaller_error_is_tighter() -> None:
    event = PoissonSampled(0.1, Gaussian(2.0))
    wide, narrow = PrvAccountant(eps_error=0.1).compose(event, 20), PrvAccountant(eps_error=0.01).compose(event, 20)
    assert narrow.epsilon(1e-5) < wide.epsilon(1e-5)
    with pytest.raises(PrivacyParameterError, match="eps_error must be a finite number > 0"):
        PrvAccountant(eps_error=0.0)


def test_loss_of_an_added_record_has_its_distribution() -> None:
    q, sigma = 0.3, 0.8
    x = np.random.default_rng(0).standard_normal(400_000) * sigma
    loss = -np.log1p(q * np.expm1((x - 0.5) / sigma**2))
    for t in (-2.0, -0.5, 0.0, 0.1, 0.3):
        assert float(_Added(q, sigma).cdf(np.array(t))) == pytest.approx(np.mean(loss <= t), abs=4e-3)
    assert float(_Added(q, sigma).cdf(np.array(-math.log1p(-q)))) == 1.0


def test_deltas_lost_in_round_off_are_refused() -> None:
    account = PrvAccountant().compose(PoissonSampled(0.001, Gaussian(2.0)), 10)
    with pytest.raises(UnsupportedEvent, match="PRV by FFT needs delta >= 1e-09 for 10 releases"):
        account.epsilon(1e-12)


def test_a_grid_beyond_memory_is_refused() -> None:
    account = PrvAccountant().compose(PoissonSampled(0.5, Gaussian(0.3)), 10_000)
    with pytest.raises(
        UnsupportedEvent, match=r"PRV could not discretise .* grid points, more than 1048576.*use pld or rdp"
    ):
        account.epsilon(1e-5)


def test_large_sampling_probabilities_end() -> None:
    """The library's own series for fractional orders would run for ever here."""
    high = PrvAccountant().compose(PoissonSampled(0.9, Gaussian(1.2)), 5).epsilon(1e-5)
    assert high == pytest.approx(PldAccountant().compose(PoissonSampled(0.9, Gaussian(1.2)), 5).epsilon(1e-5), rel=0.01)
