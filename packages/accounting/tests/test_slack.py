"""A (0, delta)-private part adds its delta under every accountant."""

from __future__ import annotations

import math

import pytest

from dpfa_accounting.gdp import GdpAccountant
from dpfa_accounting.pld import PldAccountant
from dpfa_accounting.prv import PrvAccountant
from dpfa_accounting.rdp import RdpAccountant
from dpfa_core.events import Composed, EpsilonDelta, Gaussian

ACCOUNTANTS = [GdpAccountant, RdpAccountant, PldAccountant, PrvAccountant]


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_slack_is_taken_from_delta_and_nothing_else(accountant):
    plain = accountant().compose(Gaussian(4.0), 10)
    slack = accountant().compose(Composed((Gaussian(4.0), EpsilonDelta(0.0, 1e-7))), 10)
    assert slack.epsilon(1e-5) >= plain.epsilon(1e-5 - 1e-6)
    assert slack.epsilon(1e-5) == pytest.approx(plain.epsilon(1e-5 - 1e-6), rel=1e-6)
    assert slack.delta(2.0) == pytest.approx(plain.delta(2.0) + 1e-6, rel=1e-6)
    assert accountant.from_state(slack.state()).epsilon(1e-5) == slack.epsilon(1e-5)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_more_slack_than_delta_is_no_guarantee(accountant):
    book = accountant().compose(EpsilonDelta(0.0, 1e-6), 20)
    assert book.epsilon(1e-5) == math.inf
    assert book.epsilon(3e-5) == 0.0
    assert book.delta(1.0) == pytest.approx(2e-5)
