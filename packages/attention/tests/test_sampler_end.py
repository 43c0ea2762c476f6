from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpfa_attention.sampler_end import LAPLACE_END, cost_of_end, row_share, samplers
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Sensitivity
from dpfa_mechanisms.tails import delta_with_tail, released_numbers, tail_radius


def problem(dtype: str = "float32", rows: int = 128) -> AttentionProblem:
    return AttentionProblem(
        batch=2, q_len=rows, kv_len=128, q_heads=4, kv_heads=4, head_dim=33, dtype=dtype, clip_norm=1.0
    )


def plan(distribution: str = "gaussian", transform: str = "bm64", **more: Any) -> NoisePlan:
    scale: dict[str, Any] = {"head_scale": (0.0,) if distribution == "none" else (1.0,)}
    return NoisePlan(mechanism="m", distribution=distribution, transform=transform, **scale | more)  # type: ignore[arg-type]


def moves(row: float = 1.0) -> Sensitivity:
    return Sensitivity(norm="l2", value=1.0, naive=1.0, item="", row_bound=(0.0, row, row))


def ulp(x: float, dtype: torch.dtype) -> float:
    value = torch.tensor(x, dtype=dtype)
    return float(torch.nextafter(value, torch.tensor(math.inf, dtype=dtype)).double() - value.double())


@pytest.mark.parametrize("name", LAPLACE_END)
def test_laplace_ends_where_its_gaps_reach_the_rounding_step(name: str) -> None:
    def gap_is_hidden(magnitude: float) -> bool:
        # -ln u for u = 2**-53 (n + 1/2): neighbours lie 2**-53 exp(magnitude) apart
        return math.exp(magnitude) * 2.0**-53 <= ulp(magnitude, getattr(torch, name))

    assert gap_is_hidden(LAPLACE_END[name])
    assert not gap_is_hidden(LAPLACE_END[name] + 0.1)


@pytest.mark.parametrize(("dtype", "transform"), [("bfloat16", "bm32"), ("float16", "bm64"), ("float32", "bm64")])
@pytest.mark.parametrize("delta", [1e-6, 1e-4])
def test_delta_less_the_cost_keeps_delta(dtype: str, transform: str, delta: float) -> None:
    where = problem(dtype)
    cost = cost_of_end(plan(transform=transform), where, moves(), noise_multiplier=2.0, delta=delta)
    assert 0 < cost < delta
    sampled = delta_with_tail(
        delta - cost,
        noise_multiplier=2.0,
        numbers=released_numbers(where),
        radius=tail_radius(dtype, 32 if transform == "bm32" else 53),
    )
    assert 0.999 * delta < sampled <= delta


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@pytest.mark.parametrize("releases", [1, 10, 1000])
def test_costs_of_several_releases_add_up(distribution: str, releases: int) -> None:
    """Sampled laws are ideal ones scaled on their common support, so delta becomes growth**T * delta + T * tail."""
    where, delta, numbers = problem("bfloat16"), 1e-3, released_numbers(problem())
    short = "bm32" if distribution == "gaussian" else "bm64"
    cost = cost_of_end(plan(distribution, short), where, moves(), noise_multiplier=20.0, delta=delta)
    beyond, parts = {
        "gaussian": (math.exp(-(tail_radius("bfloat16", 32) ** 2) / 2), numbers / 2),
        "laplace": (math.exp(-LAPLACE_END["bfloat16"]), numbers),
    }[distribution]
    growth = -parts * math.log1p(-beyond)
    tail = cost - delta * math.expm1(growth)
    left = delta - releases * cost
    assert left > 0
    assert tail > 0
    assert math.exp(releases * growth) * left + releases * tail <= delta * (1 + 1e-12)


def test_more_numbers_more_shift_and_fewer_bits_cost_more() -> None:
    def cost(dtype: str = "bfloat16", rows: int = 128, z: float = 1.0, distribution: str = "gaussian") -> float:
        return cost_of_end(plan(distribution), problem(dtype, rows), moves(), noise_multiplier=z, delta=1e-5)

    assert cost("float32") > cost()
    assert cost(rows=1280) > cost()
    assert cost(z=0.5) > cost()
    assert cost("float32", distribution="laplace") > cost("float16", distribution="laplace")
    assert cost(z=0.5, distribution="laplace") > cost(z=1.0, distribution="laplace") > 0


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_a_move_that_must_be_shared_by_rows_costs_less(distribution: str) -> None:
    costs = [
        cost_of_end(plan(distribution), problem(), moves(row), noise_multiplier=0.2, delta=1e-5)
        for row in (1.0, 0.5, 0.1, 512**-0.5)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.1 * costs[0]


@pytest.mark.parametrize("row", [0.5, 0.1, 512**-0.5])
def test_no_way_to_share_the_move_costs_more_than_what_is_charged(row: float) -> None:
    """Any number of rows may move, each by up to its bound: the tails of their pairs, taken one by one."""
    from dpfa_mechanisms.tails import gaussian_tail

    radius, z, where = 6.9, 0.2, problem()
    charged = cost_of_end(plan(), where, moves(row), noise_multiplier=z, delta=0.0)
    pairs = released_numbers(where) // 2
    # k pairs move by `step` stds each; none by more than its row may, all together by 1 / z
    for step in (row / z, row / z / 2, row / z / 4, row / z / math.sqrt(17)):
        moved = min(pairs, math.floor((1 / z) ** 2 / step**2))
        single = gaussian_tail(1 / step, numbers=2, radius=radius)
        assert moved * single <= charged * (1 + 1e-6)


def test_the_row_share_is_one_where_rows_differ_in_noise() -> None:
    assert row_share(plan(), moves(0.25)) == 0.25
    assert row_share(plan(head_scale=(1.0, 2.0)), moves(0.25)) == 1.0
    assert row_share(plan(), Sensitivity(norm="l2", value=1.0, naive=1.0, item="")) == 1.0


def test_noise_of_unknown_end_is_refused() -> None:
    for distribution, dtype in (("custom", "float32"), ("none", "float32"), ("laplace", "float64")):
        with pytest.raises(PrivacyParameterError, match=rf"got {distribution} in {dtype}; choose one of these"):
            cost_of_end(plan(distribution), problem(dtype), moves(), noise_multiplier=1.0, delta=1e-5)


def test_32_bits_serve_short_floats_and_gaussian_noise_alone() -> None:
    def transforms(distribution: str, transform: str, dtype: str) -> list[str]:
        return [one.transform for one in samplers(plan(distribution, transform), problem(dtype))]

    assert transforms("gaussian", "bm32", "bfloat16") == ["bm32", "bm64"]
    assert transforms("gaussian", "bm32", "float32") == ["bm64"]
    assert transforms("gaussian", "bm64", "float16") == ["bm64"]
    assert transforms("laplace", "bm32", "bfloat16") == ["bm64"]
