from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from dpfa_attention.pricing import PricedRelease, noiseless_release, priced_release
from dpfa_attention.sampler_end import cost_of_end
from dpfa_core.errors import PluginError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import Composed, EpsilonDelta, Event
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Sensitivity
from dpfa_core.spending import spending, upper_bound
from dpfa_mechanisms.gaussian import Gaussian, gaussian_delta
from dpfa_mechanisms.sensitivity import sensitivity


def priced(
    mechanism: str = "gaussian",
    accountant: str | None = None,
    *,
    epsilon: float = 1.0,
    delta: float = 1e-5,
    lifetime_delta: float = 0.0,
    **changes: Any,
) -> PricedRelease:
    spec = PrivacySpec(epsilon=epsilon, delta=delta, unit="sequence")
    return priced_release(MECHANISMS.entry(mechanism), accountant, spec, problem(**changes), lifetime_delta)


def problem(**changes: Any) -> AttentionProblem:
    shape: dict[str, Any] = {"batch": 2, "q_len": 128, "kv_len": 128, "q_heads": 4, "kv_heads": 4, "head_dim": 32}
    return AttentionProblem(**shape | {"clip_norm": 1.0} | changes)


def charge(event: Event) -> float:
    assert isinstance(event, Composed)
    end = event.events[1]
    assert isinstance(end, EpsilonDelta)
    return end.delta


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sampled_gaussian_keeps_the_promise_and_accounting_agrees(epsilon: float, delta: float, dtype: str) -> None:
    if delta == 1e-10 and dtype == "float32" and epsilon >= 0.1:
        with pytest.raises(PrivacyParameterError, match=r"delta must exceed .*, what the end of the noise sampler"):
            priced(epsilon=epsilon, delta=delta)
        return
    if delta < 0.3 and dtype == "float16" and epsilon <= 1e-2:
        with pytest.raises(PrivacyParameterError, match="float16's largest number"):
            priced(epsilon=epsilon, delta=delta, dtype=dtype)
        return
    where = problem(dtype=dtype)
    release = priced(epsilon=epsilon, delta=delta, dtype=dtype)
    ideal = gaussian_delta(epsilon, release.noise_multiplier)
    assert release.sensitivity is not None
    multiplier = {"noise_multiplier": release.noise_multiplier}
    total = ideal + cost_of_end(release.plan, where, release.sensitivity, **multiplier, delta=ideal)
    assert 0.9 * delta < total <= delta
    assert 0.99 * epsilon < release.epsilon <= epsilon
    assert charge(release.event) < delta


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace", "low_rank(rank=4)", "discrete_gaussian"])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_a_ledgers_price_of_one_call_is_not_above_what_the_call_promised(mechanism: str, epsilon: float) -> None:
    """A budget of epsilon holds one call of epsilon, in every shape: accounting rounds up, too."""
    for rows in (1, 2, 3, 5, 23):
        release = priced(mechanism, epsilon=epsilon, lifetime_delta=1e-5, q_len=rows, kv_len=rows)
        assert spending(((release.event, 1),), 1e-5).epsilon <= epsilon


def test_scale_is_multiplier_times_sensitivity_rounded_up() -> None:
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
    for name, factor in (("gaussian", 1.0), ("laplace", math.sqrt(2.0))):
        release = priced(name)
        bound = sensitivity(spec, problem(), MECHANISMS.create(name).norm)
        assert release.sensitivity == bound
        least = release.noise_multiplier * bound.value
        assert least <= release.plan.head_scale[0] <= least * (1 + 1e-6)
        assert release.noise_std == release.plan.head_scale[0] * factor


class _Uneven(Gaussian):
    """Noise by rows; a quarter too little in the rows that see all keys, if told so."""

    short = 1.0

    def plan(self, sensitivity: Sensitivity, multipliers: tuple[float, ...], problem: AttentionProblem) -> NoisePlan:
        even = super().plan(sensitivity, multipliers, problem)
        return dataclasses.replace(even, row_scale=(1.0,) * problem.kv_len + (self.short,))


@pytest.mark.parametrize("short", [1.0, 0.75])
def test_uneven_noise_is_held_to_the_multiplier_it_claims(monkeypatch: pytest.MonkeyPatch, short: float) -> None:
    monkeypatch.setattr(_Uneven, "short", short)
    monkeypatch.setattr("dpfa_attention.pricing._additive", lambda entry: _Uneven())
    priced_release.cache_clear()
    if short == 1.0:
        assert priced().plan.row_scale[-1] == 1.0
    else:
        with pytest.raises(PluginError, match=r"must plan noise of multiplier .* or more, as it says, got rows"):
            priced()
    priced_release.cache_clear()


def test_laplace_keeps_pure_epsilon_but_for_the_end_of_its_sampler() -> None:
    release = priced("laplace", epsilon=2.0, delta=1e-8)
    assert release.noise_multiplier == pytest.approx(0.5, rel=1e-15)
    assert release.plan.transform == "bm64"
    assert priced("laplace", epsilon=2.0, delta=1e-8, dtype="bfloat16").plan.transform == "bm64"
    assert 0 < charge(release.event) < 1e-9


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_an_accountant_asked_for_confirms_its_price(accountant: str) -> None:
    release = priced(accountant=accountant)
    assert release.noise_multiplier >= priced().noise_multiplier
    left = math.nextafter(1e-5 - charge(priced().event) * 1.001, 0.0)
    event = MECHANISMS.create("gaussian").event(release.noise_multiplier)
    assert upper_bound(accountant, ((event, 1),), left) <= 1.0
    assert 0.99 < release.epsilon <= 1.0


def test_rdp_pricing_needs_more_noise() -> None:
    assert priced(accountant="rdp").noise_std > 1.05 * priced().noise_std


def test_short_floats_take_32_bits_where_delta_can_pay_for_them() -> None:
    assert priced(dtype="float32").plan.transform == "bm64"
    assert priced(dtype="bfloat16").plan.transform == "bm32"
    assert priced(dtype="bfloat16", delta=1e-7).plan.transform == "bm64"
    assert priced(dtype="float16", delta=1e-3).plan.transform == "bm32"
    assert priced(dtype="float16").plan.transform == "bm64"


def test_the_ledgers_delta_enters_the_charge() -> None:
    once, lifetime = priced(dtype="bfloat16"), priced(dtype="bfloat16", lifetime_delta=1e-2)
    assert lifetime.plan == once.plan
    assert charge(lifetime.event) > charge(once.event)


def test_what_pays_for_the_end_is_missing_in_the_noise() -> None:
    ideal = MECHANISMS.create("gaussian").calibrate(1.0, 1e-5)
    assert ideal < priced().noise_multiplier < 1.01 * ideal


def test_a_price_is_looked_up_the_second_time() -> None:
    assert priced() is priced()
    assert priced() is not priced(epsilon=1.5)


def test_pld_below_its_delta_has_no_price() -> None:
    with pytest.raises(UnsupportedEvent, match="PLD"):
        priced(accountant="pld", delta=5e-10, dtype="bfloat16")


def test_without_noise_the_norm_of_the_clip_is_the_mechanisms() -> None:
    for name, norm in (("gaussian", "l2"), ("laplace", "l1")):
        release = noiseless_release(MECHANISMS.entry(name), problem())
        assert (release.plan.distribution, release.plan.norm, release.epsilon) == ("none", norm, math.inf)
