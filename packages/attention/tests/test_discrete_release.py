"""The discrete Gaussian through the front door: on its grid, priced as what it is, at next to no end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.sampler_end import cost_of_end
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Composed, DiscreteGaussian, EpsilonDelta
from dpfa_core.ledger import Ledger
from dpfa_core.spec import AttentionProblem, NoisePlan, Sensitivity

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "return_privacy_stats": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_release_lies_on_the_grid_and_is_charged_as_discrete(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, dtype: torch.dtype
) -> None:
    out, stats = dp_flash_attn_func(*inputs(dtype=dtype), **PRIVATE, mechanism="discrete_gaussian", ledger=ledger)
    ((event, _),) = ledger.events()
    assert isinstance(event, Composed)
    noise, end = event.events
    assert noise == DiscreteGaussian(stats.noise_multiplier)
    assert isinstance(end, EpsilonDelta)
    assert 0 < end.delta < 1e-15
    assert 0.9 < stats.epsilon_spent <= 1.0
    (plan,) = watched.plans
    multiples = out.double() / plan.grid
    assert (multiples == multiples.round()).all()
    # the price by concentrated privacy alone is above that of the continuous one
    _, continuous = dp_flash_attn_func(*inputs(dtype=dtype), **PRIVATE, ledger=ledger)
    assert stats.noise_std > continuous.noise_std


def test_the_grid_takes_no_gradient_away(inputs: Callable[..., Any], ledger: Ledger) -> None:
    grads = []
    for mechanism in ("gaussian", "discrete_gaussian"):
        qkv = [x.requires_grad_() for x in inputs()]
        out, _ = dp_flash_attn_func(*qkv, **PRIVATE, mechanism=mechanism, ledger=ledger)
        grads.append(torch.autograd.grad(out.sum(), qkv))
    for discrete, continuous in zip(*grads, strict=True):
        assert torch.equal(discrete, continuous)


def test_its_end_grows_with_the_numbers_and_stays_far_below_any_delta() -> None:
    plan = NoisePlan(mechanism="m", distribution="discrete_gaussian", head_scale=(1.0,), grid=0.5, transform="bm64")
    bound = Sensitivity(norm="l2", value=1.0, naive=1.0, item="")
    costs = []
    for rows in (10, 100_000):
        shape = AttentionProblem(batch=1, q_len=rows, kv_len=8, q_heads=16, kv_heads=16, head_dim=128, clip_norm=1.0)
        costs.append(cost_of_end(plan, shape, bound, noise_multiplier=0.25, delta=1e-5))
    assert costs[1] == pytest.approx(10_000 * costs[0])
    assert 0 < costs[1] < 1e-10
    # 128 bits decide, and neighbours are told apart by (1 + e**epsilon) times what they miss
    assert costs[0] >= 10 * 16 * 128 * 2.0**-127 * (1 + math.exp(42))
    with pytest.raises(PrivacyParameterError, match=r"must have a noise multiplier of 0.25 or more, got 0.2\. Lower"):
        cost_of_end(plan, shape, bound, noise_multiplier=0.2, delta=1e-5)
