from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats as laws
from torch import Tensor

from dpfa_attention import dp_flash_attn_func, process_ledger
from dpfa_core.errors import LedgerError
from dpfa_core.events import NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.sensitivity import sensitivity

ALPHA = 1e-6
PLAIN: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """PyTorch's own attention with an explicit bottom-right mask; the cap by hand."""
    S, Sk = q.shape[1], k.shape[1]
    ahead = torch.arange(Sk)[None, :] - (torch.arange(S)[:, None] + Sk - S)
    visible = torch.ones(S, Sk, dtype=torch.bool)
    if causal:
        visible &= ahead <= 0
    if window[0] >= 0:
        visible &= ahead >= -window[0]
    if window[1] >= 0:
        visible &= ahead <= window[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = softcap * torch.tanh(q @ k.mT / math.sqrt(q.shape[-1]) / softcap)
        return (torch.softmax(logits.masked_fill(~visible, -math.inf), -1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"S": 1, "Sk": 7}, {"causal": True}),
        ({"S": 5, "Sk": 12}, {"causal": True}),
        ({"S": 33, "D": 16, "Hk": 1}, {"causal": True}),
        ({"S": 20, "Hk": 2}, {"window": (3, 2)}),
        ({"S": 20, "Sk": 26}, {"window": (4, -1), "causal": True}),
        ({"S": 17, "Hk": 2}, {"softcap": 1.5, "causal": True}),
    ],
)
def test_without_epsilon_and_clip_it_is_plain_attention(
    inputs: Callable[..., Any], ledger: Ledger, shape: dict[str, int], options: dict[str, Any]
) -> None:
    q, k, v = inputs(**shape)
    arguments = {"window_size" if name == "window" else name: value for name, value in options.items()}
    out, stats = dp_flash_attn_func(q, k, v, **arguments, **PLAIN, ledger=ledger, return_privacy_stats=True)
    torch.testing.assert_close(out, definition(q, k, v, **options), atol=1e-5, rtol=1e-5)
    assert list(ledger.events()) == [(NonPrivate(), 1)]
    assert (stats.epsilon_spent, stats.noise_std, stats.privacy_mechanism) == (math.inf, 0.0, "none")


def test_rows_that_see_no_key_are_zero(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs(S=6, Sk=4)
    out = dp_flash_attn_func(q, k, v, causal=True, **PLAIN, ledger=ledger)
    assert not out[:, :2].any()
    assert out[:, 2:].all()


def test_softcap_is_logit_bound_and_a_scale_is_a_scale(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    capped = dp_flash_attn_func(q, k, v, softcap=0.7, softmax_scale=0.2, **PLAIN, ledger=ledger)
    bounded = dp_flash_attn_func(q, k, v, logit_bound=0.7, softmax_scale=0.2, **PLAIN, ledger=ledger)
    again = dp_flash_attn_func(
        q * 0.2 * math.sqrt(8), k, v, softcap=0.7, logit_bound=0.7, deterministic=True, **PLAIN, ledger=ledger
    )
    assert torch.equal(capped, bounded)
    torch.testing.assert_close(again, capped)


def test_clip_norm_none_means_one_when_epsilon_is_finite(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    stds = [
        dp_flash_attn_func(q, k, v, **PRIVATE, clip_norm=norm, ledger=ledger, return_privacy_stats=True)[1].noise_std
        for norm in (None, 1.0, 2.0)
    ]
    assert stds[0] == stds[1] == pytest.approx(stds[2] / 2, rel=1e-6)


def test_a_row_that_is_not_finite_counts_as_zeros(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    zeros = [x.clone() for x in (q, k, v)]
    for x, z, bad in zip((q, k, v), zeros, (math.nan, math.inf, -math.inf), strict=True):
        x[0, 1, 2, 3], z[0, 1, 2] = bad, 0.0
    outs = [
        dp_flash_attn_func(*x, epsilon=math.inf, delta=0.0, clip_norm=1.0, ledger=ledger) for x in ((q, k, v), zeros)
    ]
    assert torch.equal(*outs)
    assert dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger).isfinite().all()


def neighbours(inputs: Callable[..., Any], unit: str, queries: str, dtype: torch.dtype) -> Any:
    """Pairs that differ in batch row 0 (sequence) or its token 0 (as far apart as they get, and random)."""
    for seed in range(6):
        one = [4.0 * x for x in inputs(B=2, S=8, H=2, D=4, dtype=dtype, seed=seed)]
        two = [x.clone() for x in one]
        fresh = [4.0 * x for x in inputs(B=2, S=8, H=2, D=4, dtype=dtype, seed=100 + seed)]
        tokens = slice(None) if unit == "sequence" else slice(0, 1)
        for index in range(0 if queries == "private" else 1, 3):
            two[index][0, tokens] = fresh[index][0, tokens]
        if seed % 2:
            # all values alike, and opposite in the neighbour; the token's key aligned with every query
            one[2][0], two[2][0] = 5.0, (-5.0 if unit == "sequence" else 5.0)
            two[2][0, tokens] = -5.0
            one[0][0] = 9.0
            one[1][0], one[1][0, tokens] = -9.0, 9.0
            two[1][0] = one[1][0]
            two[0][0] = one[0][0]
            if queries == "private":
                two[0][0, tokens] = -9.0
        yield one, two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize(
    ("unit", "queries", "clip", "causal"),
    [
        ("sequence", "private", "value", False),
        ("sequence", "private", "output", True),
        ("token", "private", "value", False),
        ("token", "private", "value", True),
        ("token", "public", "value", False),
        ("token", "public", "value", True),
    ],
)
def test_replacing_a_record_moves_the_output_by_at_most_the_sensitivity(
    inputs: Callable[..., Any], dtype: torch.dtype, mechanism: str, unit: Any, queries: Any, clip: Any, causal: bool
) -> None:
    options: dict[str, Any] = {
        "clip": clip,
        "clip_norm": 1.5,
        "logit_bound": 0.5,
        "causal": causal,
        "unit": unit,
        "queries": queries,
        "mechanism": mechanism,
        "delta": 1e-5,
    }
    moves = []
    for one, two in neighbours(inputs, unit, queries, dtype):
        _, stats = dp_flash_attn_func(*one, epsilon=1.0, **options, return_privacy_stats=True)
        outs = [dp_flash_attn_func(*x, epsilon=math.inf, **options).double() for x in (one, two)]
        moves.append(torch.linalg.vector_norm(outs[0] - outs[1], ord=1 if mechanism == "laplace" else 2).item())
    scale = stats.noise_std / (math.sqrt(2.0) if mechanism == "laplace" else 1.0)
    bound = scale / stats.noise_multiplier
    assert max(moves) <= bound
    # a bound a third smaller would be wrong: the check can fail
    assert max(moves) >= 0.67 * bound


def test_the_sensitivity_is_the_tight_one(inputs: Callable[..., Any], ledger: Ledger) -> None:
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="private")
    problem = AttentionProblem(
        batch=2, q_len=9, kv_len=9, q_heads=4, kv_heads=4, head_dim=8, causal=True, clip_norm=1.0, logit_bound=0.5
    )
    tight = sensitivity(spec, problem, "l2")
    tokens = Ledger.memory(unit="token", relation="replace")
    _, stats = dp_flash_attn_func(
        *inputs(),
        causal=True,
        unit="token",
        queries="private",
        logit_bound=0.5,
        **PRIVATE,
        ledger=tokens,
        return_privacy_stats=True,
    )
    assert stats.noise_std / stats.noise_multiplier == pytest.approx(tight.value, rel=1e-6)
    assert tight.value < 0.6 * tight.naive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_noise_of_one_call_has_the_law_it_states(
    inputs: Callable[..., Any], ledger: Ledger, dtype: torch.dtype, mechanism: str
) -> None:
    q, k, v = inputs(B=2, S=64, H=4, D=34, dtype=dtype)
    options: dict[str, Any] = {"delta": 1e-5, "mechanism": mechanism, "clip_norm": 2.0, "ledger": ledger}
    noised, stats = dp_flash_attn_func(q, k, v, epsilon=4.0, seed=77, return_privacy_stats=True, **options)
    exact = dp_flash_attn_func(q, k, v, epsilon=math.inf, **options)
    noise = ((noised.double() - exact.double()) / stats.noise_std).flatten().numpy()
    law = laws.norm() if mechanism == "gaussian" else laws.laplace(scale=1 / math.sqrt(2.0))
    assert laws.kstest(noise, law.cdf).pvalue > ALPHA
    if mechanism == "gaussian":
        low, high = laws.chi2(noise.size).ppf([ALPHA / 2, 1 - ALPHA / 2])
        assert low < np.square(noise).sum() < high
    assert abs(noise.mean()) * math.sqrt(noise.size) < laws.norm.isf(ALPHA / 2)
    rows = noise.reshape(2 * 64 * 4, 34)
    assert np.unique(rows, axis=0).shape == rows.shape


def test_equal_calls_differ(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs(S=32)
    for seed in (None, 5150):
        one, two = (dp_flash_attn_func(q, k, v, **PRIVATE, seed=seed, ledger=ledger) for _ in range(2))
        _, stats = dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger, return_privacy_stats=True)
        assert (one != two).float().mean() > 0.99
        # independent, not a common part with something added
        gap = ((one - two).double().square().mean() / (2 * stats.noise_std**2)).item()
        assert 0.85 < gap < 1.15


def test_non_contiguous_inputs_are_the_same_inputs(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs(S=8, H=8)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    one = dp_flash_attn_func(q, k, v, **PLAIN, ledger=ledger)
    assert torch.equal(one, dp_flash_attn_func(*turned, **PLAIN, ledger=ledger))


def test_stats_state_the_promise(inputs: Callable[..., Any], ledger: Ledger, releasing: str) -> None:
    _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger, return_privacy_stats=True)
    assert 0.999 < stats.epsilon_spent <= 1.0
    assert (stats.delta, stats.unit, stats.relation, stats.scope) == (1e-5, "sequence", "replace", "release")
    assert (stats.privacy_mechanism, stats.backend, stats.secure_noise) == ("gaussian", releasing, True)
    assert f"{stats.epsilon_spent:.2f} {stats.grad_norm:.3f}" == "1.00 nan"
    assert [line.id for line in ledger.releases()] == [stats.event_id]


def test_add_or_remove_needs_half_the_noise_of_replace(inputs: Callable[..., Any]) -> None:
    stds = {}
    for relation in ("replace", "add_or_remove"):
        _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, relation=relation, return_privacy_stats=True)
        stds[relation] = stats.noise_std
    assert stds["replace"] == pytest.approx(2 * stds["add_or_remove"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_inputs_dtype(inputs: Callable[..., Any], ledger: Ledger, dtype: torch.dtype) -> None:
    out = dp_flash_attn_func(*inputs(dtype=dtype), **PRIVATE, ledger=ledger)
    assert (out.dtype, out.shape) == (dtype, (2, 9, 4, 8))


def test_a_ledger_of_other_records_is_refused(inputs: Callable[..., Any], watched: Any) -> None:
    for terms, text in (
        ({"unit": "token", "relation": "replace"}, "kept for unit='sequence', got one for 'token'"),
        ({"unit": "sequence", "relation": "add_or_remove"}, "kept for relation='replace', got one for 'add_or_remove'"),
    ):
        with pytest.raises(LedgerError, match=text):
            dp_flash_attn_func(*inputs(), **PRIVATE, ledger=Ledger.memory(**terms))  # type: ignore[arg-type]
    assert watched.calls == 0


def test_without_a_ledger_the_process_ledger_is_charged(inputs: Callable[..., Any]) -> None:
    _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, relation="add_or_remove", return_privacy_stats=True)
    assert [line.id for line in process_ledger("sequence", "add_or_remove").releases()][-1] == stats.event_id


def test_the_signature_is_the_contracts() -> None:
    parameters = list(inspect.signature(dp_flash_attn_func).parameters.values())
    written = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.kind != p.KEYWORD_ONLY
    )
    named = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p.kind == p.KEYWORD_ONLY
    )
    assert written == (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    )
    assert named == (
        "epsilon, delta, unit='sequence', relation='replace', queries=None, clip_norm=None, clip='value', "
        "logit_bound=None, mechanism='gaussian', noise_structure=None, head_epsilons=None, "
        "allow_infinite_heads=False, backend='auto', seed=None, ledger=None, return_privacy_stats=False"
    )
