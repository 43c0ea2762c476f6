"""The least valid upper bound over the first-party accountants, and nobody else's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dpfa_core.errors import PluginError, UnsupportedEvent
from dpfa_core.events import Gaussian, NonPrivate
from dpfa_core.spending import spending, within

SOURCE = """
    from dpfa_core.errors import UnsupportedEvent
    class Book:
        contract_version, name, bound = 1, {name!r}, "upper"
        def __init__(self): self.count = 0
        def supports(self, event): return ()
        def compose(self, event, count=1):
            if type(event).__name__ not in {events!r}: raise UnsupportedEvent("not this event")
            self.count += count
            return self
        def epsilon(self, delta): return {epsilon}
        def delta(self, epsilon): return 0.0
        def state(self): return {{}}
        @classmethod
        def from_state(cls, state): return cls()
"""


def add(plugins: Any, name: str, epsilon: str, events: tuple[str, ...], distribution: str) -> None:
    source = SOURCE.format(name=name, events=events, epsilon=epsilon)
    plugins.add(distribution, "accountants", {name: f"a_{name}:Book"}, {f"a_{name}": source})


def test_the_number_of_record_is_the_least_first_party_bound(plugins: Any) -> None:
    add(plugins, "rdp", "2.0 * self.count", ("Gaussian", "NonPrivate"), "dpfa-accounting")
    add(plugins, "gdp", "1.5 * self.count", ("Gaussian",), "dpfa-verification")
    add(plugins, "free", "0.0", ("Gaussian", "NonPrivate"), "acme-accountant")
    found = spending([(Gaussian(1.0), 2)], 1e-5)
    assert found.epsilon == 3.0
    assert found.by_accountant == (("gdp", 3.0), ("rdp", 4.0))
    mixed = spending([(Gaussian(1.0), 1), (NonPrivate(), 1)], 1e-5)
    assert mixed.epsilon == 4.0
    assert mixed.reasons == (("gdp", "not this event"),)
    assert within([(Gaussian(1.0), 2)], 1e-5, 3.0)
    assert not within([(Gaussian(1.0), 2)], 1e-5, 2.9)


@pytest.mark.parametrize("value", ["float('nan')", "-1.0"])
def test_an_answer_that_is_no_bound_is_not_used(plugins: Any, value: str) -> None:
    add(plugins, "rdp", value, ("Gaussian",), "dpfa-accounting")
    assert not within([(Gaussian(1.0), 1)], 1e-5, math.inf)
    with pytest.raises(UnsupportedEvent, match=r"no installed accountant has a bound.*must answer with a number >= 0"):
        spending([(Gaussian(1.0), 1)], 1e-5)


def test_nothing_released_costs_nothing(plugins: Any) -> None:
    assert spending([], 1e-5).epsilon == 0.0


def test_pricing_needs_a_first_party_accountant(plugins: Any) -> None:
    add(plugins, "free", "0.0", ("Gaussian",), "acme-accountant")
    with pytest.raises(PluginError, match="got none installed; pip install dpfa-accounting"):
        spending([(Gaussian(1.0), 1)], 1e-5)
    with pytest.raises(PluginError, match="needs an accountant"):
        within([(Gaussian(1.0), 1)], 1e-5, 1.0)


def test_loose_bounds_are_told_with_the_accountant(plugins: Any) -> None:
    source = SOURCE.format(name="rdp", events=("Gaussian",), epsilon="2.0")
    source += '        def remarks(self, event): return ("it is loose.",)\n'
    plugins.add("dpfa-accounting", "accountants", {"rdp": "a_rdp:Book"}, {"a_rdp": source})
    add(plugins, "gdp", "1.5", ("Gaussian",), "dpfa-verification")  # has nothing to say
    assert spending([(Gaussian(1.0), 1)], 1e-5).remarks == (("rdp", "it is loose."),)
