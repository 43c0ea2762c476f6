"""A module's floating-point masks: finite numbers are a public bias of the logits, as in ``nn.MultiheadAttention``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention import score_noise
from dpfa_attention.checkpointed_module import DPCheckpointedAttention
from dpfa_attention.enhanced_module import EnhancedDPFlashAttention
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.score_noise import bounded_scores
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger

E, H, B, S = 16, 4, 3, 6
AHEAD = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDING = torch.arange(S) >= torch.tensor([6, 4, 2])[:, None]
EXACT: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MASKS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "for all": ({"attn_mask": words(S, S)}, ~PADDING | True),
    "each head": ({"attn_mask": words(B * H, S, S)}, ~PADDING | True),
    "of keys": ({"key_padding_mask": words(B, S)}, ~PADDING | True),
    "of both": ({"attn_mask": words(B * H, S, S), "key_padding_mask": words(B, S, seed=2)}, ~PADDING | True),
    "causal": ({"attn_mask": words(S, S).masked_fill(AHEAD, -math.inf)}, ~PADDING | True),
    "causal, each head": ({"attn_mask": words(B * H, S, S).masked_fill(AHEAD, -1e9)}, ~PADDING | True),
    "padding": ({"key_padding_mask": words(B, S).masked_fill(PADDING, -math.inf)}, ~PADDING | True),
    "padding apart": ({"attn_mask": words(S, S), "key_padding_mask": PADDING}, ~PADDING | True),
    "causal and padding": (
        {"attn_mask": words(S, S).masked_fill(AHEAD, -math.inf), "key_padding_mask": PADDING},
        ~PADDING,
    ),
}
"""The arguments, and the rows that are not padding."""


def pair(**options: Any) -> tuple[nn.MultiheadAttention, DPFlashAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, batch_first=options.get("batch_first", True))
    nn.init.normal_(theirs.in_proj_weight, std=0.4)
    ours = DPFlashAttention(E, H, **{"ledger": Ledger.memory(), **EXACT, **options})
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("setting", ["release", "training"])
@pytest.mark.parametrize("name", MASKS)
def test_with_a_bias_it_is_torchs_module(name: str, setting: str, batch_first: bool) -> None:
    arguments, rows = MASKS[name]
    theirs, ours = pair(setting=setting, batch_first=batch_first)
    x = words(B, S, E) if batch_first else words(B, S, E).transpose(0, 1)
    expected, out = theirs(x, x, x, **arguments)[0], ours(x, **arguments)
    if not batch_first:
        expected, out = expected.transpose(0, 1), out.transpose(0, 1)
    torch.testing.assert_close(out[rows], expected[rows], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), ours(x, **arguments), atol=1e-3)


def test_one_sequence_has_its_bias() -> None:
    theirs, ours = pair()
    x = words(S, E)
    arguments = {"attn_mask": words(H, S, S), "key_padding_mask": words(S)}
    torch.testing.assert_close(ours(x, **arguments), theirs(x, x, x, **arguments)[0], atol=1e-5, rtol=1e-5)


def test_a_bias_stands_beside_a_window() -> None:
    _, ours = pair(window_size=(1, 0))
    x, bias = words(B, S, E), words(S, S)
    inside = torch.ones(S, S, dtype=torch.bool).tril() & torch.ones(S, S, dtype=torch.bool).triu(-1)
    theirs = pair()[0]
    expected = theirs(x, x, x, attn_mask=bias.masked_fill(~inside, -math.inf))[0]
    torch.testing.assert_close(ours(x, attn_mask=bias), expected, atol=1e-5, rtol=1e-5)


def test_a_bias_changes_no_noise_and_no_price() -> None:
    ledger = Ledger.memory(unit="token", relation="replace", delta=1e-5)
    ours = DPFlashAttention(E, H, 1.0, 1e-6, unit="token", logit_bound=1.0, ledger=ledger)
    plain = ours(words(B, S, E), return_privacy_stats=True)[1]
    biased = ours(words(B, S, E), attn_mask=words(S, S), return_privacy_stats=True)[1]
    assert (biased.noise_std, biased.epsilon_spent) == (plain.noise_std, plain.epsilon_spent)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_mask_that_asks_for_a_gradient_is_refused_in_a_release(name: str) -> None:
    _, ours = pair()
    shape = (S, S) if name == "attn_mask" else (B, S)
    for mask in (words(*shape), torch.zeros(shape)):
        with pytest.raises(NotPrivateError, match=r"must not require a gradient"):
            ours(words(B, S, E), **{name: mask.requires_grad_()})
    with torch.no_grad():
        ours(words(B, S, E), **{name: mask})


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("setting", ["release", "training"])
@pytest.mark.parametrize("name", ["for all", "each head", "of keys", "causal", "causal and padding"])
def test_recomputed_projections_know_the_bias(name: str, setting: str) -> None:
    arguments, rows = MASKS[name]
    options: dict[str, Any] = {"setting": setting, "upstream_gradients": "allow", "ledger": Ledger.memory(), **EXACT}
    _, plain = pair(**options)
    ours = DPCheckpointedAttention(E, H, segments=2 if setting == "release" else 1, **options).eval()
    ours.load_state_dict(plain.state_dict())
    found = []
    for module in (plain, ours):
        x = words(B, S, E).requires_grad_()
        out = module(x, **arguments)
        (out[rows] * words(*out[rows].shape, seed=3)).sum().backward()
        found.append([out, x.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_noise_on_scores_has_the_bias_before_the_bound() -> None:
    q, k, bias = words(1, S, H, 4), words(1, S, H, 4, seed=2), words(1, H, S, S)
    logits = torch.einsum("bihd,bjhd->bihj", q, k) / 2.0 + bias.transpose(1, 2)
    torch.testing.assert_close(bounded_scores(q, k, 0.5, bias), 0.5 * torch.tanh(logits / 0.5))


def test_the_research_module_takes_a_bias_with_either_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    bias, x = words(S, S), words(B, S, E)
    theirs, plain = pair()
    ours = EnhancedDPFlashAttention(E, H, ledger=Ledger.memory(), **EXACT)
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ours(x, attn_mask=bias), theirs(x, x, x, attn_mask=bias)[0], atol=1e-5, rtol=1e-5)
    given: list[Tensor | None] = []
    monkeypatch.setattr(score_noise, "bounded_scores", lambda *a: given.append(a[3]) or bounded_scores(*a))
    scores: dict[str, Any] = {"noise_site": "scores", "values": "public", "logit_bound": 1.0, "mechanism": "gaussian"}
    EnhancedDPFlashAttention(E, H, 1.0, 1e-5, ledger=Ledger.memory(), **scores)(x, attn_mask=bias)
    assert given[0] is not None
    assert torch.equal(given[0], bias[None, None])
