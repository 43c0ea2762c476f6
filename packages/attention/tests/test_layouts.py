"""Packed, cached and transposed inputs are the same attention as a plain call on each sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_attention import release_op
from dpfa_attention.functional import dp_flash_attn_func
from dpfa_attention.kv_cache import dp_flash_attn_with_kvcache
from dpfa_attention.qkv_packed import dp_flash_attn_qkvpacked_func
from dpfa_attention.sdpa_layout import dp_scaled_dot_product_attention
from dpfa_attention.varlen import dp_flash_attn_varlen_func
from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_kernels_torch.noise.keys import KeySource

PLAIN: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
Q_LENGTHS, K_LENGTHS = [3, 0, 5, 1], [4, 2, 5, 0]


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(inputs: Callable[..., Any], q_lengths: list[int], k_lengths: list[int]) -> tuple[Any, ...]:
    q, k, v = inputs(B=1, S=sum(q_lengths), Sk=sum(k_lengths), H=4, Hk=2)
    return (q[0], k[0], v[0], ends(q_lengths), ends(k_lengths), max(q_lengths), max(k_lengths))


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KeySource(5).next_release("release", torch.device("cpu"))
    monkeypatch.setattr(release_op, "release_key", lambda *_: key)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (1, 0), "softcap": 0.7}])
def test_packed_sequences_attend_as_if_each_were_alone(
    inputs: Callable[..., Any], ledger: Ledger, options: dict[str, Any]
) -> None:
    q, k, v, *lengths = packed(inputs, Q_LENGTHS, K_LENGTHS)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dp_flash_attn_varlen_func(*leaves, *lengths, **options, **PLAIN, ledger=ledger)
    assert len(list(ledger.releases())) == 1
    parts = []
    for b, (m, n) in enumerate(zip(Q_LENGTHS, K_LENGTHS, strict=True)):
        rows, keys = (slice(int(lengths[i][b]), int(lengths[i][b + 1])) for i in (0, 1))
        alone = [q[None, rows], k[None, keys], v[None, keys]]
        parts.append(dp_flash_attn_func(*alone, **options, **PLAIN, ledger=ledger)[0] if m and n else q[rows] * 0)
    apart = torch.cat(parts)
    torch.testing.assert_close(out, apart)
    torch.manual_seed(0)
    dout = torch.randn_like(out)
    for one, two in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(apart, leaves, dout), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.usefixtures("one_key")
def test_noise_of_a_packed_row_does_not_depend_on_the_length_of_other_sequences(inputs: Callable[..., Any]) -> None:
    def noise(q_lengths: list[int]) -> tuple[Tensor, Any]:
        q, k, v, *lengths = packed(inputs, q_lengths, q_lengths)
        out, stats = dp_flash_attn_varlen_func(
            q, k, v * 0.0, *lengths, **PRIVATE, ledger=Ledger.memory(), return_privacy_stats=True
        )
        return out, stats

    # the longest sequence is the same, so is the sensitivity; the first one grows
    (one, stats), (two, same) = noise([2, 6]), noise([4, 6])
    assert stats.noise_std == same.noise_std
    assert one.any(-1).all()
    assert torch.equal(one[:2], two[:2])
    assert torch.equal(one[2:], two[4:])


def test_sensitivity_of_packed_sequences_is_that_of_the_longest(inputs: Callable[..., Any]) -> None:
    for unit in ("sequence", "token"):
        options: dict[str, Any] = {
            **PRIVATE, "unit": unit, "queries": "private", "logit_bound": 0.5, "return_privacy_stats": True,
        }  # fmt: skip
        stds = [
            dp_flash_attn_varlen_func(*packed(inputs, lengths, lengths), **options)[1].noise_std
            for lengths in ([5], [5, 5], [2, 5, 4], [9, 5])
        ]
        assert stds[0] == stds[1]
        # a shorter sequence bounds a token less well, and a row no worse
        assert stds[2] == stds[0] if unit == "sequence" else stds[2] >= stds[0]
        assert stds[3] != stds[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", ["public", "private"])
def test_replacing_a_packed_token_moves_the_output_by_at_most_the_sensitivity(queries: Any, causal: bool) -> None:
    lengths = [3, 0, 6]
    more: tuple[Any, ...] = (ends(lengths), ends(lengths), 6, 6)
    options: dict[str, Any] = {
        "unit": "token", "queries": queries, "causal": causal, "delta": 1e-5, "clip_norm": 1.5, "logit_bound": 0.5,
    }  # fmt: skip
    moves = []
    for token in range(sum(lengths)):
        # all weight that the bound allows on this token, and its value turned round
        q, k, v = torch.full((9, 2, 4), 9.0), torch.full((9, 2, 4), -9.0), torch.full((9, 2, 4), 5.0)
        k[token] = 9.0
        other = [x.clone() for x in (q, k, v)]
        other[2][token] = -5.0
        if queries == "private":
            other[0][token] = -9.0
        outs = [dp_flash_attn_varlen_func(*x, *more, epsilon=math.inf, **options).double() for x in ((q, k, v), other)]
        moves.append(torch.linalg.vector_norm(outs[0] - outs[1]).item())
    stats = dp_flash_attn_varlen_func(q, k, v, *more, epsilon=1.0, **options, return_privacy_stats=True)[1]
    bound = stats.noise_std / stats.noise_multiplier
    assert max(moves) <= bound
    # a smaller bound would be wrong; with private queries these pairs are not the worst ones
    assert max(moves) >= (0.95 if queries == "public" else 0.67) * bound


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(2, 3, 4, 8)}, "q must be a packed tensor"),
        ({3: ends([3, 0, 5])}, "rise from 0 to the 9 rows of q"),
        ({3: torch.tensor([0, 4, 3, 8, 9])}, "rise from 0"),
        ({3: ends([4, 5])}, "must describe 2 sequences"),
        ({5: 4}, "max_seqlen_q"),
        ({3: [0, 9]}, "must be an int32 or int64 tensor"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    inputs: Callable[..., Any], ledger: Ledger, change: dict[int, Any], text: str
) -> None:
    arguments = list(packed(inputs, Q_LENGTHS, K_LENGTHS))
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(PrivacyParameterError, match=text):
        dp_flash_attn_varlen_func(*arguments, **PRIVATE, ledger=ledger)
    assert not list(ledger.releases())


def test_packed_qkv_is_the_call_with_three_tensors(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    out = dp_flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True, **PLAIN, ledger=ledger)
    assert torch.equal(out, dp_flash_attn_func(q, k, v, causal=True, **PLAIN, ledger=ledger))
    with pytest.raises(PrivacyParameterError, match="qkv must be"):
        dp_flash_attn_qkvpacked_func(q, **PRIVATE)


def test_decoding_through_a_cache_is_causal_attention_over_the_whole(
    inputs: Callable[..., Any], ledger: Ledger
) -> None:
    q, k, v = inputs(B=2, S=7, H=4, Hk=2)
    whole = dp_flash_attn_func(q, k, v, causal=True, **PLAIN, ledger=ledger)
    cache = [torch.full((2, 9, 2, 8), math.nan) for _ in range(2)]
    # both rows start with 3 tokens; then row 1 lags one token behind row 0
    common: dict[str, Any] = {"causal": True, **PLAIN, "ledger": ledger}
    first = dp_flash_attn_with_kvcache(q[:, :3], *cache, k[:, :3], v[:, :3], cache_seqlens=0, **common)
    torch.testing.assert_close(first, whole[:, :3])
    at = torch.tensor([3, 2])
    for _ in range(3):
        step = [torch.stack([x[0, at[0] : at[0] + 1], x[1, at[1] : at[1] + 1]]) for x in (q, k, v)]
        out = dp_flash_attn_with_kvcache(step[0], *cache, step[1], step[2], cache_seqlens=at, **common)
        for b in range(2):
            torch.testing.assert_close(out[b, 0], whole[b, at[b]])
        at += 1
    assert torch.equal(cache[0][0, :6], k[0, :6])
    assert cache[0][0, 6:].isnan().all()


def test_each_call_on_a_cache_is_charged_and_they_add_up(inputs: Callable[..., Any]) -> None:
    tokens = Ledger.memory(unit="token", relation="replace", delta=1e-5)
    q, k, v = inputs(S=1, Sk=8)
    for call in range(3):
        _, stats = dp_flash_attn_with_kvcache(
            q, k, v, k[:, :1], v[:, :1], cache_seqlens=4 + call, causal=True, **PRIVATE, unit="token",
            queries="private", logit_bound=1.0, ledger=tokens, return_privacy_stats=True,
        )  # fmt: skip
        assert stats.epsilon_spent <= 1.0
    assert len(list(tokens.releases())) == 3
    assert 1.0 < tokens.spent(accountant="gdp") < 3.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"return_softmax_lse": True}, NotPrivateError, "log-sum-exp"),
        ({"rotary_cos": torch.ones(1)}, PrivacyParameterError, "rotary_cos must be None"),
        ({"block_table": torch.ones(1)}, PrivacyParameterError, "block_table must be None"),
        ({"cache_seqlens": 9}, PrivacyParameterError, "leave a length <= 9"),
        ({"cache_seqlens": None}, PrivacyParameterError, "leave a length <= 9"),
        ({"cache_seqlens": torch.tensor([-1, 2])}, PrivacyParameterError, "lie in 0 ... 9"),
        ({"v": None}, PrivacyParameterError, "v must be given with k"),
    ],
)
def test_a_refused_call_leaves_the_cache_alone(
    inputs: Callable[..., Any], ledger: Ledger, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    q, k, v = inputs(S=1)
    cache = [torch.zeros(2, 9, 4, 8) for _ in range(2)]
    arguments = {"k": k, "v": v, "cache_seqlens": 2, **PRIVATE, "ledger": ledger, **options}
    with pytest.raises(error, match=text):
        dp_flash_attn_with_kvcache(q, *cache, **arguments)
    assert not cache[0].any()
    assert not list(ledger.releases())


def masks(S: int) -> dict[str, Tensor]:
    diagonal = torch.ones(S, S, dtype=torch.bool).tril()
    padding = torch.arange(S) < torch.tensor([S, 4])[:, None]
    return {
        "all visible": torch.ones(1, 1, dtype=torch.bool),
        "padding": padding[:, None, None],
        "padding, additive": torch.zeros(2, 1, 1, S).masked_fill(~padding[:, None, None], -math.inf),
        "causal": diagonal,
        "causal, finite": torch.zeros(S, S).masked_fill(~diagonal, -1e9)[None, None],
        "nothing to see in one row": torch.tensor([True, False])[:, None, None, None].expand(2, 1, S, S),
    }


@pytest.mark.parametrize("name", list(masks(6)))
def test_a_mask_means_what_it_means_to_torch(inputs: Callable[..., Any], ledger: Ledger, name: str) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(S=6, H=4, Hk=2))
    mask = masks(6)[name]
    out = dp_scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True, **PLAIN, ledger=ledger)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, expected.nan_to_num(0.0))


def test_is_causal_and_a_key_that_is_hidden(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(S=6))
    out = dp_scaled_dot_product_attention(q, k, v, is_causal=True, **PLAIN, ledger=ledger)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    mask = masks(6)["padding, additive"]
    out = dp_scaled_dot_product_attention(q, k, v, mask, logit_bound=1.0, **PLAIN, ledger=ledger)
    k[1, :, 4:], v[1, :, 4:] = 77.0, math.nan
    assert torch.equal(out, dp_scaled_dot_product_attention(q, k, v, mask, logit_bound=1.0, **PLAIN, ledger=ledger))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attn_mask": torch.full((6, 6), math.inf)}, r"must hold finite numbers \(a bias\) and -inf"),
        ({"attn_mask": torch.full((6, 6), math.nan)}, r"must hold finite numbers \(a bias\) and -inf"),
        (
            {"attn_mask": torch.stack([torch.eye(6), torch.ones(6, 6).triu()])[:, None].bool()},
            "must show the same in every batch row, or hide the end of each",
        ),
        ({"attn_mask": (torch.arange(4) < 2)[:, None, None].expand(4, 6, 6)}, "hide the same for all heads"),
        ({"attn_mask": torch.ones(5, 6).bool()}, "must broadcast"),
        ({"attn_mask": torch.ones(6, 6).bool(), "is_causal": True}, "is_causal must be False beside"),
        ({"attn_mask": torch.ones(6, 6).long()}, "bool or floating-point"),
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
    ],
)
def test_what_cannot_be_said_in_the_torch_layout_is_refused(
    inputs: Callable[..., Any], ledger: Ledger, options: dict[str, Any], text: str
) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(S=6))
    with pytest.raises(PrivacyParameterError, match=text):
        dp_scaled_dot_product_attention(q, k, v, **options, **PRIVATE, ledger=ledger)
    assert not list(ledger.releases())


def test_alignment_and_heads_are_never_guessed(inputs: Callable[..., Any]) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(S=3, Sk=6))
    with pytest.raises(PrivacyParameterError, match=r"as many queries as keys.*bottom-right"):
        dp_scaled_dot_product_attention(q, k, v, is_causal=True, **PRIVATE)
    with pytest.raises(PrivacyParameterError, match="enable_gqa=True"):
        dp_scaled_dot_product_attention(q, k[:, :2], v[:, :2], **PRIVATE)
