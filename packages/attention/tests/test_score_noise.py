"""Noise on scores covers queries and keys where values are public, and nothing where they are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats as statistics
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpfa_attention.enhanced_module import EnhancedDPFlashAttention
from dpfa_attention.release_paths import check_release_paths
from dpfa_attention.score_noise import attention_of_noised_scores, bounded_scores
from dpfa_core import selection
from dpfa_core.errors import BudgetExhausted, NotPrivateError, PrivacyParameterError
from dpfa_core.events import NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_core.spec import PrivacySpec
from dpfa_mechanisms.gaussian import gaussian_epsilon

SPEC = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
ALPHA = 1e-6


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(q: Tensor, k: Tensor, v: Tensor, ledger: Ledger, **options: Any) -> tuple[Tensor, Any]:
    return attention_of_noised_scores(
        q, k, v, SPEC, **({"values": "public", "logit_bound": 1.0, "ledger": ledger.number} | options)
    )


def test_with_one_key_the_output_is_the_value_so_private_values_cost_everything() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    q, k, v = words(2, 3, 2, 8), words(2, 1, 2, 8), words(2, 1, 2, 8, seed=2)
    out, stats = call(q, k, v, ledger, values="private")
    torch.testing.assert_close(out, v.expand(2, 3, 2, 8))
    assert stats.epsilon_spent == math.inf == ledger.spent()
    assert list(ledger.events()) == [(NonPrivate(), 1)]


def test_public_values_leave_the_price_of_a_release_of_scores() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    S, Sk, H, bound = 5, 7, 4, 0.5
    _, stats = call(words(2, S, H, 8), words(2, Sk, 2, 8), words(2, Sk, 2, 8), ledger, logit_bound=bound)
    assert 0.99 < stats.epsilon_spent <= 1.0
    assert gaussian_epsilon(stats.noise_multiplier, 1e-5) <= 1.0
    # one record moves every score of its row by twice the bound
    furthest = 2.0 * bound * math.sqrt(S * H * Sk)
    assert furthest <= stats.noise_std / stats.noise_multiplier <= furthest * (1 + 1e-4)
    assert 0.99 < ledger.spent() <= 1.0
    assert next(iter(ledger.releases())).purpose == "release of scores; values declared public"


def test_what_is_mixed_are_bounded_scores_with_exactly_that_noise() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    B, S, H, D = 40, 8, 2, 16
    q, k, bound = words(B, S, H, D), words(B, S, H, D, seed=3), 1e-3
    v = torch.zeros(B, S, H, D)
    v[:, torch.arange(S), :, torch.arange(S)] = 1.0  # the output of a row is its weights
    out, stats = call(q, k, v, ledger, logit_bound=bound)
    scores = out[..., :S].log() - bounded_scores(q, k, bound)
    # the softmax takes the mean away; what is left of S normals is a rotation of S - 1
    basis, _ = torch.linalg.qr(torch.cat([torch.ones(S, 1), torch.eye(S)[:, 1:]], 1))
    values = (scores @ basis[:, 1:]).flatten().double().numpy() / stats.noise_std
    assert statistics.kstest(values, "norm").pvalue > ALPHA
    assert abs(float((values**2).sum()) - len(values)) < 5.5 * math.sqrt(2.0 * len(values))


def test_masks_and_padding_hide_after_the_noise() -> None:
    ledger = Ledger.memory()
    q, k, v = words(2, 6, 2, 8), words(2, 6, 2, 8, seed=2), words(2, 6, 2, 8, seed=3)
    hidden = v.clone()
    hidden[:, 4:] = math.nan
    lengths = ((4, 4), (4, 4))
    one, _ = call(q, k, v, ledger, causal=True, lengths=lengths, seed=123)
    assert not one[:, 4:].any()
    torch.testing.assert_close(one[:, 0], v[:, 0])
    assert call(q, k, hidden, ledger, lengths=lengths)[0].isfinite().all()
    k[0, 1, 0, 0], q[1, 2, 1, 3] = math.inf, math.nan
    assert call(q, k, v, ledger)[0].isfinite().all()


def test_the_gradient_is_that_of_attention_with_the_noise_held(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = words(2, 3, 2, 5, seed=9)
    backend = selection.backend("torch")
    monkeypatch.setattr(type(backend), "privatize_", lambda self, x, *_, **__: x.add_(fixed))
    tensors = [words(*shape, seed=seed) for seed, shape in enumerate([(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)])]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, _ = call(*leaves, Ledger.memory())
    found = torch.autograd.grad(out.square().sum(), leaves)
    q, k, v = leaves
    logits = torch.tanh(torch.einsum("bihd,bjhd->bihj", q, k) / 2.0) + fixed
    expected = torch.einsum("bihj,bjhd->bihd", logits.softmax(-1), v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves))


def test_nothing_is_drawn_where_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5, budget=0.5)
    monkeypatch.setattr(type(selection.backend("torch")), "privatize_", lambda *_, **__: pytest.fail("noise was made"))
    with pytest.raises(BudgetExhausted):
        call(words(2, 3, 2, 8), words(2, 3, 2, 8), words(2, 3, 2, 8), ledger)


def module(**options: Any) -> EnhancedDPFlashAttention:
    settings = {"mechanism": "gaussian", "noise_site": "scores", "logit_bound": 1.0, "ledger": Ledger.memory()}
    return EnhancedDPFlashAttention(16, 2, 1.0, 1e-5, **(settings | options))


def test_a_module_puts_its_noise_there_when_it_is_asked_to() -> None:
    x, memory = words(2, 4, 16), words(2, 5, 16, seed=2)
    ours = module()
    assert ours(x, return_privacy_stats=True)[1].epsilon_spent == math.inf
    assert float(ours.get_privacy_spent()) == math.inf
    ours = module(values="public")
    _, stats = ours(x, memory, memory, return_privacy_stats=True)
    assert stats.epsilon_spent <= 1.0
    assert ours.get_privacy_spent()["forward_count"] == 1
    assert ours.export_privacy_analysis()["configuration"]["noise_site"] == "scores"
    ours.set_noise_multiplier(9.0)
    assert ours(x, memory, memory, return_privacy_stats=True)[1].noise_multiplier == 9.0
    # the values' way is open, and named
    ours = module(values="public")
    assert check_release_paths(ours, x).leaks
    assert not list(ours._calls.ledger.releases())
    with pytest.raises(NotPrivateError, match="once for each output"):
        checkpoint(module(upstream_gradients="allow"), x.requires_grad_(), use_reentrant=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"logit_bound": None}, "needs a logit_bound"),
        ({"unit": "token"}, "needs unit='sequence'"),
        ({"mechanism": "laplace"}, "needs gaussian noise without structure, got 'laplace'"),
        ({"noise_structure": "low_rank", "rank": 4}, "needs gaussian noise without structure"),
        ({"head_epsilons": [1.0, 1.0]}, "needs no head_epsilons"),
        ({"adaptive_noise": True}, "noise_site must be 'output'"),
        ({"checkpoint_gradients": True}, "needs checkpoint_gradients=False"),
        ({"noise_site": "output", "values": "public"}, "values must be 'private'"),
        ({"noise_site": "weights"}, "noise_site must be one of"),
        ({"values": "secret"}, "values must be one of"),
    ],
)
def test_what_has_no_price_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        module(**options)
