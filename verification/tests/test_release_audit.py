"""The call as a black box: what its outputs alone prove is below the claim, and not far below it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dpfa_core import selection
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_kernels_torch.backend import TorchBackend
from dpfa_verification.audit.adversary import Attack, ascend, noiseless
from dpfa_verification.audit.call import released
from dpfa_verification.audit.cases import problem_of, spec_of
from dpfa_verification.audit.likelihood_ratio import Audit, any_epsilon, audit, bounds, gaussian_mu
from dpfa_verification.truth.profiles import gaussian_epsilon

pytest.importorskip(
    "dpfa_attention", reason="dpfa-attention is not installed: the call is audited", exc_type=ModuleNotFoundError
)

TRIALS = {1.0: 120_000, 2.0: 60_000, 4.0: 60_000}
"""By epsilon: the smaller it is, the more of them the same share of it takes."""

SMALL = problem_of(q_len=4, kv_len=4, head_dim=2)
UNITS = {"sequence": spec_of("sequence"), "token": spec_of("token", "private")}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs() -> dict[str, Attack]:
    """The farthest neighbours that ascent finds, for each unit."""
    return {unit: ascend(noiseless(TorchBackend()), spec, SMALL, restarts=8) for unit, spec in UNITS.items()}


def audited(pair: Attack, spec: PrivacySpec, problem: AttentionProblem, trials: int, **more: Any) -> tuple[Audit, Any]:
    one, two = (
        released(inputs, spec, problem, trials, seed=7001 + side, **more)
        for side, inputs in enumerate((pair.one, pair.two))
    )
    return audit(one[0], two[0], spec.delta), one[1]


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0])
def test_outputs_prove_most_of_the_claim_and_not_more(pairs: dict[str, Attack], unit: str, epsilon: float) -> None:
    spec = dataclasses.replace(UNITS[unit], epsilon=epsilon)
    problem = dataclasses.replace(SMALL, dtype="float32" if unit == "sequence" else "bfloat16")
    found, stats = audited(pairs[unit], spec, problem, TRIALS[epsilon])
    print(f"{unit}, epsilon {epsilon:g}: {found.epsilon:.3f} by mu, {found.epsilon_of_any:.3f} of any mechanism")
    assert 0.7 * epsilon <= found.epsilon <= epsilon
    assert found.mu <= 1.0 / stats.noise_multiplier
    assert 0.0 < found.epsilon_of_any <= epsilon


def test_laplace_noise_keeps_epsilon_for_any_mechanism() -> None:
    spec = dataclasses.replace(spec_of("sequence"), epsilon=2.0)
    # one number: many of them would hide the event that shows a pure epsilon
    problem = problem_of(q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1, dtype="float32", logit_bound=None)
    pair = ascend(noiseless(TorchBackend(), "l1"), spec, dataclasses.replace(problem, dtype="float64"), "l1")
    found, _ = audited(pair, spec, problem, TRIALS[spec.epsilon], mechanism="laplace")
    print(f"laplace, epsilon 2: {found.epsilon_of_any:.3f} of any mechanism")
    assert 0.7 * 2.0 <= found.epsilon_of_any <= 2.0


class Faulty(TorchBackend):
    """The torch backend with a fault in the noise of its releases."""

    def __init__(self, fault: Any) -> None:
        self.fault = fault

    def release(self, *arguments: Any, **scale: Any) -> Any:
        return self.fault(super().release, *arguments, **scale)


def scaled(factor: float) -> Any:
    def fault(true: Any, q: Any, k: Any, v: Any, problem: Any, plan: Any, *rest: Any, **scale: Any) -> Any:
        short = dataclasses.replace(plan, head_scale=tuple(factor * std for std in plan.head_scale))
        return true(q, k, v, problem, short, *rest, **scale)

    return fault


def noise_of(true: Any, *arguments: Any, **scale: Any) -> tuple[Any, Any, Any]:
    """(noiseless output, the noise that is added, what is saved)."""
    out, saved = true(*arguments, **scale)
    plan = dataclasses.replace(arguments[4], distribution="none", head_scale=(0.0,))
    exact, _ = true(*arguments[:4], plan, *arguments[5:], **scale)
    return exact, out - exact, saved


def reused_across_heads(true: Any, *arguments: Any, **scale: Any) -> Any:
    exact, noise, saved = noise_of(true, *arguments, **scale)
    return exact + noise[:, :, :1], saved


def reused_across_rows(true: Any, *arguments: Any, **scale: Any) -> Any:
    exact, noise, saved = noise_of(true, *arguments, **scale)
    return exact + noise[:, :1], saved


def one_head_left_without(true: Any, *arguments: Any, **scale: Any) -> Any:
    exact, noise, saved = noise_of(true, *arguments, **scale)
    noise[:, :, 0] = 0.0
    return exact + noise, saved


def log_sum_exp_in_the_last_column(true: Any, q: Any, k: Any, *rest: Any, **scale: Any) -> Any:
    out, saved = true(q, k, *rest, **scale)
    logits = torch.einsum("bihd,bjhd->bihj", q, k) * scale["softmax_scale"]
    return torch.cat([out[..., :-1], logits.logsumexp(-1, keepdim=True)], -1), saved


def put(monkeypatch: pytest.MonkeyPatch, faulty: Any) -> None:
    """Into the place of whichever backend a release takes here."""
    for name in ("cpu", "torch"):
        monkeypatch.setitem(selection._instances, name, faulty)


@pytest.mark.parametrize(
    "fault",
    [
        scaled(0.9),
        reused_across_heads,
        reused_across_rows,
        one_head_left_without,
        log_sum_exp_in_the_last_column,
    ],
    ids=["sigma 10 % short", "noise reused across heads", "across rows", "a bare head", "the log-sum-exp"],
)
def test_an_op_that_leaks_is_refuted(monkeypatch: pytest.MonkeyPatch, pairs: dict[str, Attack], fault: Any) -> None:
    put(monkeypatch, Faulty(fault))
    spec = dataclasses.replace(UNITS["token"], epsilon=4.0)
    found, stats = audited(pairs["token"], spec, dataclasses.replace(SMALL, dtype="float32"), 40_000)
    print(f"epsilon 4 is claimed, {found.epsilon:.3f} found")
    assert found.epsilon > 1.03 * spec.epsilon
    assert found.mu > 1.0 / stats.noise_multiplier


def test_an_op_with_twice_the_noise_is_seen_to_waste_it(
    monkeypatch: pytest.MonkeyPatch, pairs: dict[str, Attack]
) -> None:
    put(monkeypatch, Faulty(scaled(2.0)))
    spec = dataclasses.replace(UNITS["token"], epsilon=4.0)
    found, _ = audited(pairs["token"], spec, dataclasses.replace(SMALL, dtype="float32"), 40_000)
    print(f"epsilon 4 is claimed, {found.epsilon:.3f} found")
    assert found.epsilon < 0.7 * spec.epsilon


def test_the_bounds_are_those_of_known_laws() -> None:
    dice = np.random.default_rng(3)
    for mu in (0.5, 2.0):
        one, two = dice.standard_normal((60_000, 3)), dice.standard_normal((60_000, 3))
        two[:, 1] += mu
        found = audit(one, two, 1e-5)
        assert 0.85 * mu < found.mu < mu
        assert found.epsilon == pytest.approx(float(gaussian_epsilon(1e-5, found.mu)))
    same = audit(dice.standard_normal((40_000, 3)), dice.standard_normal((40_000, 3)), 1e-5)
    assert (same.mu, same.epsilon, same.epsilon_of_any) == (0.0, 0.0, 0.0)


def test_what_nothing_separates_is_proved_only_as_far_as_counts_go() -> None:
    low, high = bounds(1000, 0, 1000, 0.999)
    assert low == pytest.approx(0.0005 ** (1 / 1000))
    assert high == pytest.approx(1 - 0.0005 ** (1 / 1000))
    assert gaussian_mu(0.2, 0.3) == 0.0
    assert any_epsilon(low, high, 1e-5) == pytest.approx(math.log((low - 1e-5) / high))
    assert any_epsilon(0.0, high, 1e-5) == -math.inf
