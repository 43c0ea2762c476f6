"""Heads that differ in noise: ratios under a total, a list alone, and heads without noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.head_budgets import head_budgets
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Composed, Gaussian, Laplace, NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_core.registry import MECHANISMS
from dpfa_core.spending import upper_bound
from dpfa_mechanisms.gaussian import gaussian_delta, gaussian_epsilon

LIST = [0.5, 1.0, 2.0, 4.0]


def call(qkv: Any, ledger: Ledger, epsilon: float = 2.0, delta: float = 1e-5, **options: Any) -> Any:
    return dp_flash_attn_func(
        *qkv, epsilon=epsilon, delta=delta, ledger=ledger, return_privacy_stats=True, head_epsilons=LIST, **options
    )


@pytest.mark.parametrize("mechanism", ["gaussian", "pld", "laplace", "low_rank", "block_diagonal"])
def test_under_a_total_the_list_fixes_ratios_and_the_total_is_kept(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, mechanism: str
) -> None:
    _, stats = call(inputs(D=32), ledger, mechanism=mechanism)
    assert 1.99 < stats.epsilon_spent <= 2.0
    ((event, _),) = ledger.events()
    assert isinstance(event, Composed)
    heads = event.events[0]
    assert isinstance(heads, Composed)
    assert len(heads.events) == 4
    # the ledger's line, by an accountant that had no part in it
    assert upper_bound("pld", ((event, 1),), 1e-5) < 2.02
    (plan,) = watched.plans
    assert stats.head_noise_scales == plan.head_scale
    mu = [1.0 / scale for scale in plan.head_scale]
    if mechanism == "laplace":
        meant = LIST
    else:
        meant = [1.0 / MECHANISMS.create("gaussian").calibrate(epsilon, 1e-5) for epsilon in LIST]
    for got, wanted in zip(mu, meant, strict=True):
        assert got / mu[0] == pytest.approx(wanted / meant[0], rel=1e-6)
    assert list(stats.head_epsilons) == sorted(stats.head_epsilons)


@pytest.mark.parametrize(("mechanism", "delta"), [("gaussian", 1e-5), ("laplace", 1e-6)])
def test_alone_the_list_is_what_each_head_costs(
    inputs: Callable[..., Any], ledger: Ledger, mechanism: str, delta: float
) -> None:
    _, stats = call(inputs(), ledger, math.inf, delta, mechanism=mechanism)
    for found, asked in zip(stats.head_epsilons, LIST, strict=True):
        assert 0.98 * asked < found <= asked
    together = sum(LIST) if mechanism == "laplace" else stats.epsilon_spent
    assert 0.98 * together < stats.epsilon_spent <= together * (1 + 1e-9)
    assert 4.0 < stats.epsilon_spent < 7.6


def test_gaussian_heads_compose_to_the_total() -> None:
    gaussian = MECHANISMS.create("gaussian")
    budgets = head_budgets(gaussian, tuple(LIST), 2.0, 1e-5, heads=4, allow_infinite=False)
    event = budgets.event(gaussian, 3.0)
    parts = [part.noise_multiplier for part in event.events]  # type: ignore[attr-defined]
    together = math.fsum(part**-2 for part in parts) ** -0.5
    assert 3.0 <= together <= 3.0 * (1 + 1e-12)
    assert all(isinstance(part, Gaussian) for part in event.events)  # type: ignore[attr-defined]
    assert budgets.epsilons(3.0, 1e-5) == tuple(gaussian_epsilon(part, 1e-5) for part in parts)
    laplace = MECHANISMS.create("laplace")
    event = head_budgets(laplace, (1.0, 3.0), 2.0, 0.0, heads=2, allow_infinite=False).event(laplace, 0.5)
    assert all(isinstance(part, Laplace) for part in event.events)  # type: ignore[attr-defined]
    assert [1 / part.noise_multiplier for part in event.events] == pytest.approx([0.5, 1.5])  # type: ignore[attr-defined]


@pytest.mark.parametrize("structure", [None, "low_rank"])
def test_a_head_without_noise_makes_the_whole_release_not_private(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, structure: str | None
) -> None:
    qkv = inputs(D=32)
    options: dict[str, Any] = {"head_epsilons": [1.0, math.inf, 1.0, 1.0], "allow_infinite_heads": True}
    out, stats = dp_flash_attn_func(
        *qkv,
        epsilon=2.0,
        delta=1e-5,
        clip_norm=0.5,
        noise_structure=structure,
        ledger=ledger,
        return_privacy_stats=True,
        **options,
    )
    assert stats.epsilon_spent == math.inf
    assert stats.noise_multiplier == 0.0
    assert stats.head_epsilons[1] == math.inf
    ((event, _),) = ledger.events()
    assert event == NonPrivate()
    assert "some heads without noise" in next(iter(ledger.releases())).purpose
    plain = dp_flash_attn_func(*qkv, epsilon=math.inf, delta=0.0, clip_norm=0.5, ledger=ledger)
    if structure is None:
        assert torch.equal(out[:, :, 1], plain[:, :, 1])
    assert (out[:, :, [0, 2, 3]] != plain[:, :, [0, 2, 3]]).all()
    plan = watched.plans[0]
    first = plan.head_scale[0]
    assert plan.head_scale == (first, 0.0, first, first)
    if structure is None:
        # epsilon binds the other heads: nine rows of each move by two clip norms at most, and three heads compose
        delta = gaussian_delta(2.0, first / (2 * 0.5 * math.sqrt(9)) / math.sqrt(3))
        assert 0.99e-5 < delta <= 1e-5


def test_heads_of_noise_that_does_not_compose_are_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    with pytest.raises(PrivacyParameterError, match="must go with gaussian or laplace noise, got mechanism 'discrete"):
        call(inputs(), ledger, mechanism="discrete_gaussian")
    assert not list(ledger.events())
