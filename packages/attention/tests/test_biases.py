"""A public bias enters before the bound: the attention that it means, the same noise, and no gradient of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpfa_attention import (
    dp_flash_attn_func,
    dp_flash_attn_qkvpacked_func,
    dp_flash_attn_varlen_func,
    dp_flash_attn_with_kvcache,
    dp_scaled_dot_product_attention,
)
from dpfa_core.errors import BackendUnavailable, NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger

PLAIN: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
TOKEN: dict[str, Any] = {"unit": "token", "queries": "private", "logit_bound": 0.5}
SLOPES = torch.tensor([0.5, 0.25, 0.0, -0.125])


def alibi_of(slopes: Tensor, S: int, Sk: int) -> Tensor:
    """[B or 1, H, S, Sk], from flash-attn's documentation."""
    distance = (torch.arange(S)[:, None] + Sk - S - torch.arange(Sk)).abs()
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance


def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, visible: Tensor | None = None, softcap: float = 0.0):
    """Bias, cap, mask, softmax: [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    return (torch.softmax(logits, -1).nan_to_num(0.0) @ v).transpose(1, 2)


def seen(S: int, Sk: int, causal: bool, window: tuple[int, int]) -> Tensor:
    ahead = torch.arange(Sk) - (torch.arange(S)[:, None] + Sk - S)
    shown = torch.ones(S, Sk, dtype=torch.bool)
    if causal:
        shown &= ahead <= 0
    if window[0] >= 0:
        shown &= ahead >= -window[0]
    if window[1] >= 0:
        shown &= ahead <= window[1]
    return shown


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(
    ("shape", "causal", "window"),
    [
        ({}, False, (-1, -1)),
        ({"S": 5, "Sk": 12, "Hk": 2}, True, (-1, -1)),
        ({"S": 20, "Hk": 1}, False, (3, 2)),
        ({"S": 1, "Sk": 7}, True, (2, -1)),
        ({"S": 6, "Sk": 4}, True, (-1, -1)),
    ],
)
@pytest.mark.parametrize("slopes", [SLOPES, torch.stack([SLOPES, 2 * SLOPES])], ids=["heads", "batch and heads"])
def test_alibi_is_what_it_means_forward_and_backward(
    inputs: Callable[..., Any], ledger: Ledger, shape: Any, causal: bool, window: Any, slopes: Tensor, softcap: float
) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(**shape, dtype=torch.float64))
    S, Sk = q.shape[1], k.shape[1]
    out = dp_flash_attn_func(
        q, k, v, causal=causal, window_size=window, softcap=softcap, alibi_slopes=slopes, **PLAIN, ledger=ledger
    )
    bias = alibi_of(slopes.double(), S, Sk)
    expected = definition(q, k, v, bias, visible=seen(S, Sk, causal, window), softcap=softcap)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for one, two in zip(found, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alibi_in_every_layout_and_dtype(inputs: Callable[..., Any], ledger: Ledger, dtype: torch.dtype) -> None:
    tolerance: dict[str, float] = {"atol": 1e-5 if dtype == torch.float32 else 2e-2, "rtol": 1e-4}
    q, k, v = inputs(dtype=dtype)
    expected = definition(*(x.float() for x in (q, k, v)), alibi_of(SLOPES, 9, 9)).to(dtype)
    packed = dp_flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), alibi_slopes=SLOPES, **PLAIN, ledger=ledger)
    torch.testing.assert_close(packed, expected, **tolerance)
    # positions count from the end of what is used of the cache, and of each packed sequence
    lengths = torch.tensor([9, 4])
    cached = dp_flash_attn_with_kvcache(
        q[:, :2], k, v, cache_seqlens=lengths, causal=True, alibi_slopes=SLOPES, **PLAIN, ledger=ledger
    )
    for row, n in enumerate(lengths.tolist()):
        one = definition(
            *(x[row : row + 1].float() for x in (q[:, :2], k[:, :n], v[:, :n])),
            alibi_of(SLOPES, 2, n),
            visible=seen(2, n, True, (-1, -1)),
        )
        torch.testing.assert_close(cached[row : row + 1], one.to(dtype), **tolerance)
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    slopes = torch.stack([SLOPES, -SLOPES])
    out = dp_flash_attn_varlen_func(
        q[0], k[0], v[0], ends, ends, 6, 6, alibi_slopes=slopes, window_size=(2, 2), **PLAIN, ledger=ledger
    )
    for sequence, part in enumerate((slice(0, 3), slice(3, 9))):
        n = part.stop - part.start
        one = definition(
            *(x[:1, part].float() for x in (q, k, v)),
            alibi_of(slopes[sequence], n, n),
            visible=seen(n, n, False, (2, 2)),
        )
        torch.testing.assert_close(out[None, part], one.to(dtype), **tolerance)


def masks(S: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    padding = torch.arange(S) < torch.tensor([S, 4])[:, None, None, None]
    diagonal = torch.ones(S, S, dtype=torch.bool).tril()
    return {
        "for all": torch.randn(S, S, generator=generator),
        "by head": torch.randn(4, S, S, generator=generator),
        "by row of the batch": torch.randn(2, 1, S, S, generator=generator),
        "by key": torch.randn(2, 4, 1, S, generator=generator),
        "beside padding": torch.randn(2, 4, S, S, generator=generator).masked_fill(~padding, -math.inf),
        "beside a diagonal": torch.randn(4, S, S, generator=generator).masked_fill(~diagonal, -1e9),
    }


@pytest.mark.parametrize("name", list(masks(6)))
def test_an_additive_mask_is_what_it_is_to_torch(inputs: Callable[..., Any], ledger: Ledger, name: str) -> None:
    qkv = [x.transpose(1, 2).requires_grad_() for x in inputs(S=6, H=4, Hk=2)]
    mask = masks(6)[name]
    out = dp_scaled_dot_product_attention(*qkv, mask, enable_gqa=True, **PLAIN, ledger=ledger)
    expected = F.scaled_dot_product_attention(*qkv, mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    for one, two in zip(
        torch.autograd.grad(out.square().sum(), qkv), torch.autograd.grad(expected.square().sum(), qkv), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_bias_enters_before_the_bound_and_a_mask_after_it(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs(S=6)
    bias = torch.zeros(6, 6)
    bias[:, 2] = 9e3  # a key that would take all weight
    padded = bias.clone()
    padded[:, 5] = -1e4  # by the public rule, this one is hidden
    visible = (torch.arange(6) < 5).expand(6, 6)
    qkv = [x.transpose(1, 2) for x in (q, k, v)]
    for added, shown in ((bias, None), (padded, visible)):
        out = dp_scaled_dot_product_attention(*qkv, added, logit_bound=1.0, **PLAIN, ledger=ledger).transpose(1, 2)
        expected = definition(q, k, v, bias, visible=shown, softcap=1.0)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, TOKEN, TOKEN | {"noise_structure": "attention_aware", "causal": True}])
def test_noise_price_and_sensitivity_are_those_without_a_bias(
    inputs: Callable[..., Any], watched: Any, options: dict[str, Any]
) -> None:
    stats = []
    for slopes in (None, SLOPES):
        stats.append(
            dp_flash_attn_func(
                *inputs(), alibi_slopes=slopes, **PRIVATE, **options, return_privacy_stats=True, ledger=Ledger.memory()
            )[1]
        )
    assert stats[0].noise_std == stats[1].noise_std
    assert stats[0].epsilon_spent == stats[1].epsilon_spent
    assert watched.plans[0] == watched.plans[1]


@pytest.mark.parametrize("queries", ["private", "public"])
@pytest.mark.parametrize("strength", [0.3, 10.0, 1e3])
def test_no_bias_lets_a_token_move_the_output_further(
    inputs: Callable[..., Any], queries: Any, strength: float
) -> None:
    """Values opposite, and the bias as a help for the replaced token's key: the bound is still the bound."""
    options: dict[str, Any] = TOKEN | {"queries": queries, "clip_norm": 1.0, "delta": 1e-5}
    q, k, v = inputs(B=1, S=8, H=2, D=4)
    v = torch.ones_like(v)
    other = v.clone()
    other[0, 0] = -1.0
    _, stats = dp_flash_attn_func(q, k, v, epsilon=1.0, **options, return_privacy_stats=True)
    bound = stats.noise_std / stats.noise_multiplier
    moves = []
    for sign in (1.0, -1.0):
        bias = torch.full((8, 8), -sign * strength)
        bias[:, 0] = sign * strength
        outs = [
            dp_scaled_dot_product_attention(
                *(y.transpose(1, 2) for y in (q, k, x)), bias, epsilon=math.inf, **options
            ).double()
            for x in (v, other)
        ]
        moves.append(torch.linalg.vector_norm(outs[0] - outs[1]).item())
    assert max(moves) <= bound
    if strength > 1.0 and queries == "public":
        # a bias can reach the bound, which is that of the worst logits; it cannot pass it
        assert max(moves) >= 0.99 * bound


def test_a_bias_has_no_gradient(inputs: Callable[..., Any], ledger: Ledger, watched: Any) -> None:
    qkv = inputs(S=6)
    with pytest.raises(NotPrivateError, match=r"must not require a gradient, got one that does.*pass bias\.detach\(\)"):
        dp_flash_attn_func(*qkv, alibi_slopes=SLOPES.clone().requires_grad_(), **PRIVATE, ledger=ledger)
    mask = torch.randn(6, 6, requires_grad=True)
    with pytest.raises(NotPrivateError, match="must not require a gradient"):
        dp_scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), mask, **PRIVATE, ledger=ledger)

    def of_slopes(slopes: Tensor) -> Tensor:
        out = dp_flash_attn_func(*qkv, alibi_slopes=slopes, **PRIVATE, ledger=ledger)
        assert isinstance(out, Tensor)
        return out.sum()

    with pytest.raises(NotPrivateError, match="must not require a gradient"):
        torch.func.grad(of_slopes)(SLOPES)
    assert not list(ledger.events())
    assert watched.calls == 0
    with torch.no_grad():  # nobody asks for one
        dp_flash_attn_func(*qkv, alibi_slopes=SLOPES.clone().requires_grad_(), **PRIVATE, ledger=ledger)


def test_a_bias_that_is_not_finite_is_refused_and_costs_nothing(inputs: Callable[..., Any], ledger: Ledger) -> None:
    slopes = torch.tensor([0.0, math.nan, 0.0, 0.0])
    with pytest.raises(PrivacyParameterError, match="a bias of the logits must be finite, got 'an infinity or NaN'"):
        dp_flash_attn_func(*inputs(), alibi_slopes=slopes, **PRIVATE, ledger=ledger)
    assert not list(ledger.events())


def test_a_backend_without_biases_is_passed_over_with_its_reason(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supports(op: str, problem: Any, plan: Any) -> tuple[str, ...]:
        return ("it adds no bias.",) if problem.biased else ()

    monkeypatch.setattr(watched, "supports", supports, raising=False)
    dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    with pytest.raises(BackendUnavailable, match="it adds no bias"):
        dp_flash_attn_func(*inputs(), alibi_slopes=SLOPES, **PRIVATE, ledger=ledger)
    assert watched.calls == 1


def plain(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, **options: Any) -> Tensor:
    out = dp_flash_attn_func(q, k, v, alibi_slopes=slopes, **PLAIN | options)
    assert isinstance(out, Tensor)
    return out


def test_a_bias_goes_through_graphs_maps_and_checkpoints(inputs: Callable[..., Any], ledger: Ledger) -> None:
    torch._dynamo.reset()
    qkv = [x.requires_grad_() for x in inputs()]
    expected = plain(*qkv, SLOPES, ledger=ledger)
    grads = torch.autograd.grad(expected.square().sum(), qkv)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    graph = compiled(*qkv, SLOPES, ledger=ledger)
    torch.testing.assert_close(graph, expected)
    for one, two in zip(torch.autograd.grad(graph.square().sum(), qkv), grads, strict=True):
        torch.testing.assert_close(one, two)
    # slices with slopes of their own, and with shared ones
    many = torch.stack([SLOPES, 2 * SLOPES, 0 * SLOPES])
    mapped = torch.vmap(lambda slopes: plain(*qkv, slopes, ledger=ledger))(many)
    for slopes, out in zip(many, mapped, strict=True):
        torch.testing.assert_close(out, plain(*qkv, slopes, ledger=ledger))
    queries = torch.stack([qkv[0], 2 * qkv[0]]).detach()
    each = torch.stack([SLOPES, -SLOPES])  # [B, H]
    mapped = torch.vmap(lambda q: plain(q, qkv[1], qkv[2], each, ledger=ledger))(queries)
    for q, out in zip(queries, mapped, strict=True):
        torch.testing.assert_close(out, plain(q, qkv[1], qkv[2], each, ledger=ledger))
    # with noise, a recomputed release is found by its bias, too
    noised = checkpoint(lambda *x: plain(*x, SLOPES, **PRIVATE, ledger=ledger), *qkv, use_reentrant=False)
    before = sum(count for _, count in ledger.events())
    noised.square().sum().backward()
    assert sum(count for _, count in ledger.events()) == before
    assert all(x.grad.isfinite().all() for x in qkv)


def test_the_operators_pass_opcheck_with_a_bias(inputs: Callable[..., Any], ledger: Ledger) -> None:
    from dpfa_attention import release_op
    from dpfa_attention.terms import Terms

    caught: list[tuple[Any, ...]] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *values: Any) -> Tensor:
        caught.append((q, k, v, ticket, *values))
        return release_op.release(q, k, v, ticket, *values)

    from dpfa_attention.functional import released

    released(*inputs(), alibi_slopes=SLOPES, **PRIVATE, seed=3, ledger=ledger, compute=keep)
    ((q, k, v, ticket, *values),) = caught
    assert len(values) == len(Terms._fields) + 1
    torch.library.opcheck(release_op.release, (q, k, v, ticket, *values))
    torch.library.opcheck(release_op.release_backward, (torch.ones_like(q), q, k, v, *values))
