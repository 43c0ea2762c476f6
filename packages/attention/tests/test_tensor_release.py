"""Mechanisms that finish tensors themselves: what they may do, what they cost, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import DPFlashAttention, dp_flash_attn_func
from dpfa_core.errors import BudgetExhausted, NotPrivateError, PluginError, PrivacyParameterError
from dpfa_core.events import Laplace, NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_mechanisms.tensor_mechanism import DPMechanism

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "return_privacy_stats": True}


class Shift(DPMechanism):
    """Adds what is asked of it, so that a test sees it."""

    def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
        self.seen = tensor, sensitivity, epsilon
        return tensor + 1.0


class Priced(Shift):
    norm = "l1"

    def dp_event(self, sensitivity: float, epsilon: float, delta: float) -> Laplace:
        return Laplace(1.001 / epsilon)


def test_it_gets_clipped_attention_its_sensitivity_and_epsilon(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    mechanism = Shift()
    out, stats = dp_flash_attn_func(q, k, v, **PRIVATE, clip_norm=0.5, causal=True, mechanism=mechanism, ledger=ledger)
    exact = dp_flash_attn_func(q, k, v, epsilon=math.inf, delta=0.0, clip_norm=0.5, causal=True, ledger=Ledger.memory())
    tensor, sensitivity, epsilon = mechanism.seen
    assert torch.equal(tensor, exact)
    assert torch.equal(out, exact + 1.0)
    assert epsilon == 1.0
    assert sensitivity == pytest.approx(2 * 0.5 * math.sqrt(9 * 4), rel=1e-5)
    assert (stats.privacy_mechanism, stats.epsilon_spent, stats.secure_noise) == ("Shift", math.inf, False)
    line = next(ledger.releases())
    assert (line.event, line.mechanism, line.id) == (NonPrivate(), "Shift", stats.event_id)
    assert "nobody checked" in line.purpose


def test_an_event_of_its_own_is_priced_and_charged_before_the_noise(inputs: Callable[..., Any], ledger: Ledger) -> None:
    _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=Priced(), ledger=ledger)
    assert 0.99 < stats.epsilon_spent <= 1.0
    assert list(ledger.events()) == [(Laplace(1.001), 1)]

    class Fails(Priced):
        def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
            raise RuntimeError("no noise today")

    with pytest.raises(RuntimeError, match="no noise today"):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=Fails(), ledger=ledger)
    assert sum(count for _, count in ledger.events()) == 2
    small = Ledger.memory(delta=1e-5, budget=0.5)
    with pytest.raises(BudgetExhausted):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=Shift(), ledger=small)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"dp_event": lambda *_: Laplace(0.1)}, PluginError, "must cost at most epsilon=1.0"),
        ({"dp_event": lambda *_: 1.0}, PluginError, "must return an event"),
        ({"add_noise": lambda self, x, *_: x.sum()}, PluginError, "must return a tensor like the one it was given"),
        ({"add_noise": lambda self, x, *_: x.double()}, PluginError, "must return a tensor like the one it was given"),
        ({"norm": "whitened_l2"}, PrivacyParameterError, "norm of mechanism 'Other' must be one of"),
    ],
)
def test_a_mechanism_that_contradicts_itself_is_refused(
    inputs: Callable[..., Any], ledger: Ledger, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    mechanism = type("Other", (Shift,), change)()
    with pytest.raises(error, match=text):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=mechanism, ledger=ledger)


@pytest.mark.parametrize(
    "options",
    [{"head_epsilons": [1.0] * 4}, {"seed": 3}, {"noise_structure": "low_rank"}, {"backend": "cuda"}],
)
def test_what_it_would_not_heed_is_refused(inputs: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(PrivacyParameterError):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=Shift(), ledger=Ledger.memory(), **options)
    with pytest.raises(PrivacyParameterError, match="must be the name of an installed mechanism, or an object"):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=Shift)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["gaussian", "gaussian(noise_multiplier=4.0)", "laplacian"])
def test_it_may_not_bear_the_name_of_a_checked_one(inputs: Callable[..., Any], ledger: Ledger, name: str) -> None:
    mechanism = type("Impostor", (Shift,), {"name": name})()
    with pytest.raises(PrivacyParameterError, match="must have a name of its own"):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism=mechanism, ledger=ledger)
    assert not list(ledger.events())


def test_an_installed_one_is_used_by_name(
    inputs: Callable[..., Any], ledger: Ledger, third_party: Callable[[str, str], None]
) -> None:
    third_party("slow", "class Plugin:\n    def add_noise(self, tensor, sensitivity, epsilon): return tensor * 0\n")
    out, stats = dp_flash_attn_func(*inputs(), **PRIVATE, mechanism="slow", ledger=ledger)
    assert not out.any()
    assert (stats.epsilon_spent, stats.privacy_mechanism) == (math.inf, "slow")
    assert ("somebodys-noise", "1.2") in next(ledger.releases()).versions
    module = DPFlashAttention(16, 4, noise_mechanism="slow", ledger=ledger)
    module(torch.randn(2, 5, 16))
    spent = module.get_privacy_spent()
    assert (spent["privacy_mechanism"], float(spent)) == ("slow", math.inf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_noised_in_float32_and_rounded_once(
    inputs: Callable[..., Any], ledger: Ledger, dtype: torch.dtype
) -> None:
    mechanism = Shift()
    out, _ = dp_flash_attn_func(*inputs(dtype=dtype), **PRIVATE, mechanism=mechanism, ledger=ledger)
    assert mechanism.seen[0].dtype == torch.float32
    assert torch.equal(out, (mechanism.seen[0] + 1.0).to(dtype))


def test_a_module_takes_an_object_and_epsilon_inf_is_plain_attention() -> None:
    x, ledger = torch.randn(2, 5, 16), Ledger.memory(delta=1e-5)
    module = DPFlashAttention(16, 4, noise_mechanism=Priced(), ledger=ledger)
    module(x)
    spent = module.get_privacy_spent()
    assert (spent["privacy_mechanism"], spent["forward_count"]) == ("Priced", 1)
    assert 0.99 < float(spent) <= 1.0
    with pytest.raises(PrivacyParameterError, match="plans its noise"):
        module.set_noise_multiplier(1.0)
    plain = DPFlashAttention(16, 4, math.inf, noise_mechanism=Priced(), ledger=ledger)
    exact = DPFlashAttention(16, 4, math.inf, ledger=ledger)
    exact.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), exact(x))


def test_without_a_price_a_backward_into_the_inputs_raises_like_any_other() -> None:
    module = DPFlashAttention(16, 4, noise_mechanism=Shift(), ledger=Ledger.memory())
    with pytest.raises(NotPrivateError, match="stop at the release"):
        module(torch.randn(2, 5, 16)).sum().backward()
