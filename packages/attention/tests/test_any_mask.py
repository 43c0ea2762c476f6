"""A mask of any pattern, the same for every batch row, is served by the calls and modules that take masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfa_attention import DPFlashAttention, EnhancedDPFlashAttention, dp_scaled_dot_product_attention
from dpfa_attention.checkpointed_module import DPCheckpointedAttention
from dpfa_attention.problem import attention_problem
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Laplace
from dpfa_core.ledger import Ledger
from dpfa_core.spec import PrivacySpec
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_mechanisms.tensor_mechanism import DPMechanism

EXACT: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
TOKEN: dict[str, Any] = {"unit": "token", "queries": "private", "logit_bound": 1.0}
E, H = 16, 4


def pattern(name: str, S: int = 9, Sk: int = 9) -> Tensor:
    """bool [S, Sk], True where it shows."""
    row, key = torch.arange(S)[:, None], torch.arange(Sk)
    return {
        "documents in one row": row // 3 == key // 3,
        "a prefix that all see": (key <= row) | (key < 4),
        "every second key": (row + key) % 2 == 0,
        "first key and neighbours": (key == 0) | ((row - key).abs() <= 1),
        "two blind rows": ((row + key) % 3 > 0) & (row != 2) & (row != 5),
    }[name]


NAMES = [
    "documents in one row",
    "a prefix that all see",
    "every second key",
    "first key and neighbours",
    "two blind rows",
]


def turned(qkv: Any) -> list[Tensor]:
    return [x.transpose(1, 2) for x in qkv]


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    blind = (~mask if mask.dtype == torch.bool else mask < -1e4).all(-1, keepdim=True)
    return out.masked_fill(blind, 0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [{}, {"Hk": 2}, {"Sk": 6}, {"S": 4, "Sk": 9}], ids=str)
def test_without_noise_it_is_torchs_attention(
    inputs: Callable[..., Any], ledger: Ledger, name: str, shape: dict[str, int]
) -> None:
    qkv = turned(inputs(**shape))
    shown = pattern(name, qkv[0].shape[2], qkv[1].shape[2])
    bias = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~shown, -math.inf)
    for mask in (shown, shown.expand(2, 4, *shown.shape), bias):
        out = dp_scaled_dot_product_attention(*qkv, mask, **EXACT, ledger=ledger, enable_gqa=True)
        torch.testing.assert_close(out, torchs(*qkv, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [{}, TOKEN, TOKEN | {"queries": "public"}], ids=["sequence", "private", "public"])
@pytest.mark.parametrize("name", NAMES)
def test_the_noise_is_that_of_the_masks_own_sensitivity(
    inputs: Callable[..., Any], name: str, unit: dict[str, Any]
) -> None:
    q, k, v = inputs()
    ledger = Ledger.memory(unit=unit.get("unit", "sequence"), relation="replace")
    asked = {**PRIVATE, **unit, "ledger": ledger, "return_privacy_stats": True}
    _, stats = dp_scaled_dot_product_attention(*turned((q, k, v)), pattern(name), **asked)
    plain: dict[str, Any] = {"causal": False, "window": (-1, -1), "clip": "value", "clip_norm": 1.0}
    bound = unit.get("logit_bound")
    problem = attention_problem(q, k, v, **plain, logit_bound=bound, mask=pattern(name))
    spec = PrivacySpec(**PRIVATE, unit=unit.get("unit", "sequence"), queries=unit.get("queries"))
    claim = sensitivity(spec, problem).value
    assert stats.noise_std == pytest.approx(stats.noise_multiplier * claim, rel=1e-5)
    # the pattern is in the price: all keys shown would be another one
    every = sensitivity(spec, dataclasses.replace(problem, mask=None)).value
    assert (claim == every) == (not unit and name != "two blind rows")


def test_what_is_hidden_changes_nothing(inputs: Callable[..., Any], ledger: Ledger) -> None:
    mask = pattern("every second key")
    mask[:, 4] = False
    q, k, v = turned(inputs())
    outs = []
    for fill in (0.0, 1e4, math.nan):
        k[:, :, 4], v[:, :, 4] = fill, fill
        outs.append(dp_scaled_dot_product_attention(q, k, v, mask, **EXACT, clip_norm=1.0, ledger=ledger))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def pair(**options: Any) -> tuple[nn.MultiheadAttention, DPFlashAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, batch_first=options.get("batch_first", True))
    ours = DPFlashAttention(E, H, **EXACT | {"ledger": Ledger.memory()} | options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "two blind rows"])
def test_a_module_takes_it_with_and_without_padding(name: str, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    x = torch.randn(2, 9, E, generator=torch.Generator().manual_seed(2))
    x = x if batch_first else x.transpose(0, 1)
    hidden = ~pattern(name)
    padding = torch.arange(9) >= torch.tensor([[9], [7]])
    for masks in ({}, {"key_padding_mask": padding}):
        for attn_mask in (hidden, torch.zeros(9, 9).masked_fill(hidden, -math.inf)):
            if masks:
                masks = {"key_padding_mask": padding if attn_mask.dtype == torch.bool else padding * -1e9}
            expected = theirs(x, x, x, attn_mask=attn_mask, **masks)[0]
            found = ours(x, attn_mask=attn_mask, **masks)
            rows = ~padding if masks else torch.ones(2, 9, dtype=torch.bool)
            one, two = (y if batch_first else y.transpose(0, 1) for y in (found, expected))
            torch.testing.assert_close(one[rows], two[rows], rtol=1e-5, atol=1e-5)


def test_padded_queries_are_no_released_rows_and_padded_tokens_no_records() -> None:
    ledger = Ledger.memory(unit="token", relation="replace")
    _, ours = pair(**PRIVATE, **TOKEN, ledger=ledger)
    mask, x = ~pattern("every second key"), torch.randn(1, 9, E)
    padding = torch.arange(9)[None] >= 5
    one = ours(x, attn_mask=mask, key_padding_mask=padding, return_privacy_stats=True)[1]
    two = ours(x[:, :5], attn_mask=mask[:5, :5], return_privacy_stats=True)[1]
    assert one.noise_std == two.noise_std


def test_rows_that_differ_otherwise_are_refused(inputs: Callable[..., Any], ledger: Ledger, watched: Any) -> None:
    qkv = turned(inputs())
    masks = torch.stack([pattern("every second key"), pattern("documents in one row")])[:, None]
    with pytest.raises(PrivacyParameterError, match="must show the same in every batch row, or hide the end of each"):
        dp_scaled_dot_product_attention(*qkv, masks, **PRIVATE, ledger=ledger)
    each = masks.expand(2, 4, 9, 9).clone()
    each[:, 1] = True
    with pytest.raises(PrivacyParameterError, match="must hide the same for all heads"):
        dp_scaled_dot_product_attention(*qkv, each, **PRIVATE, ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0


def test_gradients_maps_and_graphs_know_the_mask(inputs: Callable[..., Any], ledger: Ledger) -> None:
    mask = pattern("a prefix that all see")

    def silent(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return dp_scaled_dot_product_attention(q, k, v, mask, **EXACT, ledger=ledger)

    qkv = [x.detach().requires_grad_() for x in turned(inputs())]
    expected = torch.autograd.grad(torchs(*qkv, mask).square().sum(), qkv)
    for run in (silent, torch.compile(silent, backend="aot_eager")):
        for one, two in zip(torch.autograd.grad(run(*qkv).square().sum(), qkv), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    many = [torch.stack([x, -x]).detach() for x in qkv]
    mapped = torch.func.vmap(silent)(*many)
    for part in range(2):
        torch.testing.assert_close(mapped[part], silent(*(x[part] for x in many)))


class Mine(DPMechanism):
    norm = "l1"

    def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
        return tensor

    def dp_event(self, sensitivity: float, epsilon: float, delta: float) -> Laplace:
        return Laplace(1.001 / epsilon)


def test_modules_of_every_kind_take_it() -> None:
    x, hidden = torch.randn(2, 9, E), ~pattern("first key and neighbours")
    aware = EnhancedDPFlashAttention(E, H, **PRIVATE, noise_structure="attention_aware", ledger=Ledger.memory())
    _, stats = aware(x, attn_mask=hidden, return_privacy_stats=True)
    assert 0.99 < stats.epsilon_spent <= 1.0
    assert aware.export_privacy_analysis()["sensitivity"]["ratio"] > 1.1
    moving = EnhancedDPFlashAttention(E, H, **PRIVATE, adaptive_noise=True, ledger=Ledger.memory())
    assert moving(x, attn_mask=hidden).isfinite().all()
    kept = DPCheckpointedAttention(
        E, H, **PRIVATE, clip_norm=1.0, segments=2, upstream_gradients="allow", ledger=Ledger.memory()
    )
    plain = DPFlashAttention(E, H, **PRIVATE, clip_norm=1.0, upstream_gradients="allow", ledger=Ledger.memory())
    plain.load_state_dict(kept.state_dict())
    for module in (kept, plain):
        module(x, attn_mask=hidden).sum().backward()
    torch.testing.assert_close(kept.in_proj_weight.grad, plain.in_proj_weight.grad)  # type: ignore[union-attr]
    own = DPFlashAttention(E, H, **PRIVATE, noise_mechanism=Mine(), clip_norm=100.0, ledger=Ledger.memory())
    theirs, exact = pair()
    own.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(own(x, attn_mask=hidden), exact(x, attn_mask=hidden))


def test_noise_on_scores_covers_what_the_mask_shows() -> None:
    options: dict[str, Any] = {"noise_site": "scores", "logit_bound": 1.0, "values": "public"}
    module = EnhancedDPFlashAttention(E, H, **PRIVATE | {"epsilon": 8.0}, **options, ledger=Ledger.memory())
    x, hidden = torch.randn(1, 4, E), ~torch.eye(4, dtype=torch.bool)
    # each row sees one key, so the output is its value, whatever the noise on its score
    *_, v = module._projected([x, x, x])
    torch.testing.assert_close(
        module(x, attn_mask=hidden), F.linear(v.flatten(-2), module.out_proj.weight, module.out_proj.bias)
    )
