"""Mechanisms asked for with parameters: the noise follows them, and the ledger shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from dpfa_attention import dp_flash_attn_func
from dpfa_core.errors import PluginError, PrivacyParameterError
from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger
from dpfa_core.spending import upper_bound

DELTA = 1e-5


def call(inputs: Callable[..., Any], ledger: Ledger, epsilon: float = 5.0, **options: Any) -> Any:
    return dp_flash_attn_func(
        *inputs(), epsilon=epsilon, delta=DELTA, ledger=ledger, return_privacy_stats=True, **options
    )


def test_a_structure_has_the_size_that_its_name_says(inputs: Callable[..., Any], ledger: Ledger, watched: Any) -> None:
    for options in ({"mechanism": "low_rank(rank=3)"}, {"noise_structure": "low_rank(rank=3)"}):
        _, stats = call(inputs, ledger, **options)
        assert stats.privacy_mechanism == "low_rank(rank=3)"
        assert dict(watched.plans[-1].structure.parameters)["rank"] == 3
    assert {line.mechanism for line in ledger.releases()} == {"low_rank(rank=3)"}
    assert all("dpfa-mechanisms" in dict(line.versions) for line in ledger.releases())


@pytest.mark.parametrize("alias", ["gaussian", "pld", "standard"])
def test_a_fixed_noise_multiplier_is_used_and_costs_what_it_costs(
    inputs: Callable[..., Any], ledger: Ledger, alias: str
) -> None:
    _, stats = call(inputs, ledger, mechanism=f"{alias}(noise_multiplier=4)")
    assert stats.noise_multiplier == 4.0
    (event, _), *_ = ledger.events()
    assert event.events[0] == Gaussian(4.0)
    alone = upper_bound("gdp", ((Gaussian(4.0), 1),), DELTA)
    assert alone <= stats.epsilon_spent < 1.15 * alone


def test_epsilon_is_the_most_that_fixed_noise_may_cost(inputs: Callable[..., Any], ledger: Ledger) -> None:
    with pytest.raises(PrivacyParameterError, match=r"noise_multiplier=4 must cost at most epsilon=0.5"):
        call(inputs, ledger, 0.5, mechanism="gaussian(noise_multiplier=4)")
    assert not list(ledger.events())


def test_heads_share_fixed_noise_in_the_ratios_of_their_list(inputs: Callable[..., Any], ledger: Ledger) -> None:
    for epsilon in (5.0, math.inf):
        options = {"mechanism": "gaussian(noise_multiplier=4)", "head_epsilons": [0.5, 1.0, 1.0, 2.0]}
        _, stats = call(inputs, ledger, epsilon, **options)
        scales = stats.head_noise_scales
        assert scales[0] > scales[1] == scales[2] > scales[3]
        together = sum(4.0**2 / event.noise_multiplier**2 for event in list(ledger.events())[-1][0].events[0].events)
        assert together == pytest.approx(1.0, rel=1e-6)


def test_parameters_that_do_not_exist_or_fit_are_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    with pytest.raises(PluginError, match="unexpected keyword argument 'rnk'"):
        call(inputs, ledger, mechanism="low_rank(rnk=3)")
    with pytest.raises(PrivacyParameterError, match="rank must be an integer >= 1, got 0"):
        call(inputs, ledger, mechanism="low_rank(rank=0)")
    with pytest.raises(PrivacyParameterError, match="noise_multiplier must be"):
        call(inputs, ledger, mechanism="gaussian(noise_multiplier=0)")
    assert not list(ledger.events())
