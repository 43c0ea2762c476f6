"""The faults that a caller makes most: each dies as one sentence with its remedy, uncharged and uncomputed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_attention import (
    dp_flash_attn_func,
    dp_flash_attn_varlen_func,
    dp_flash_attn_with_kvcache,
    dp_scaled_dot_product_attention,
)
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
TOKEN: dict[str, Any] = {"unit": "token", "queries": "private"}
HALF = torch.float16

TABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"dropout_p": 0.1}, "dropout_p must be 0 in a release, got 0.1."),
    ({}, TOKEN, 'unit="token" needs a logit_bound, got None;'),
    (
        {},
        TOKEN | {"clip": "output", "logit_bound": 1.0},
        "needs clip=\"value\", got 'output'; an output clip lets every row that sees the token move by twice",
    ),
    ({}, {"head_epsilons": [0.5] * 3}, "head_epsilons must hold 4 numbers, one for each part, got"),
    ({"S": 0}, {}, "q_len must be an integer >= 1, got 0. Leave out a call that has nothing to attend to."),
    ({"S": 5, "Sk": 0}, {}, "kv_len must be an integer >= 1, got 0. Leave out a call that has nothing to attend to."),
    ({"B": 0}, {}, "batch must be an integer >= 1, got 0. Leave out a call that has nothing to attend to."),
    (
        {"dtype": HALF},
        {"epsilon": 1e-3, "clip_norm": 10.0},
        "clip_norm and 8 scales of the noise must add up to 65504, float16's largest number, got",
    ),
    (
        {"dtype": HALF},
        {"epsilon": 1e-2, "clip_norm": 10.0, "mechanism": "laplace"},
        "clip_norm and 34 scales of the noise must add up to 65504",
    ),
    (
        {"dtype": HALF},
        {"epsilon": 1e-3, "clip_norm": 10.0, "mechanism": "discrete_gaussian"},
        "clip_norm and 8 scales of the noise must add up to 65504",
    ),
]


def made(inputs: Callable[..., Any], **shape: Any) -> Any:
    q, k, v = inputs(**{name: value for name, value in shape.items() if name != "Sk"})
    return (q, k[:, :0], v[:, :0]) if shape.get("Sk") == 0 else (q, k, v)


@pytest.mark.parametrize(("shape", "options", "text"), TABLE)
def test_each_fault_is_one_sentence_and_costs_nothing(
    inputs: Callable[..., Any], watched: Any, shape: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    ledger = Ledger.memory(unit=options.get("unit", "sequence"), relation="replace")
    with pytest.raises(PrivacyParameterError, match=re.escape(text)):
        dp_flash_attn_func(*made(inputs, **shape), **PRIVATE | options, ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0


@pytest.mark.parametrize("clip_norm", [1.0, 3.0])
def test_float16_that_holds_the_noise_is_released(inputs: Callable[..., Any], ledger: Ledger, clip_norm: float) -> None:
    out = dp_flash_attn_func(*inputs(dtype=HALF), epsilon=0.1, delta=1e-5, clip_norm=clip_norm, ledger=ledger)
    assert out.isfinite().all()
    # bfloat16 reaches further
    wide = inputs(dtype=torch.bfloat16)
    assert dp_flash_attn_func(*wide, epsilon=1e-3, delta=1e-5, clip_norm=10.0, ledger=ledger).isfinite().all()


def test_the_range_of_float16_counts_what_a_structure_stretches() -> None:
    from dpfa_attention.plan_checks import check_range
    from dpfa_core.spec import AttentionProblem, NoisePlan, Structure

    sizes: dict[str, int] = {"batch": 1, "q_len": 4, "kv_len": 4, "q_heads": 2, "kv_heads": 2, "head_dim": 8}
    for sparsity, clip_norm, fits in ((0.5, 30000.0, True), (0.75, 30000.0, False)):
        given = (("kept", 2.0), ("sparsity", sparsity), ("rescale", 1.0))
        plan = NoisePlan(
            mechanism="sparse",
            distribution="gaussian",
            head_scale=(1.0, 500.0),
            structure=Structure(kind="sparse", parameters=given, seed=0),
        )
        problem = AttentionProblem(**sizes, dtype="float16", clip_norm=clip_norm)
        if fits:
            check_range(plan, problem)
            continue
        with pytest.raises(PrivacyParameterError, match="Lower clip_norm, raise epsilon, or release in bfloat16"):
            check_range(plan, problem)


HIDDEN = "at least one query must see a key, got 'lengths or a mask that hide every key'. Leave out a call"


def test_a_mask_or_lengths_that_hide_every_key_are_refused(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any
) -> None:
    q, k, v = inputs(B=2, S=4)
    for mask in (torch.zeros(4, 4, dtype=torch.bool), torch.full((2, 1, 1, 4), -math.inf)):
        with pytest.raises(PrivacyParameterError, match=re.escape(HIDDEN)):
            dp_scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, **PRIVATE, ledger=ledger
            )
    ends, none = torch.tensor([0, 2, 4], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(PrivacyParameterError, match=re.escape(HIDDEN)):
        dp_flash_attn_varlen_func(q[0], k[0, :0], v[0, :0], ends, none, 2, 0, **PRIVATE, ledger=ledger)
    with pytest.raises(PrivacyParameterError, match=re.escape(HIDDEN)):
        dp_flash_attn_varlen_func(q[0, :0], k[0], v[0], none, ends, 0, 2, **PRIVATE, ledger=ledger)
    with pytest.raises(PrivacyParameterError, match=re.escape(HIDDEN)):
        dp_flash_attn_with_kvcache(q, k, v, cache_seqlens=0, **PRIVATE, ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0


def test_one_sequence_without_keys_among_others_is_released(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(B=2, S=4))
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 4, 4)
    out = dp_scaled_dot_product_attention(q, k, v, mask, epsilon=math.inf, delta=0.0, ledger=ledger)
    assert out[0].all()
    assert not out[1].any()
    # in private, its rows hold noise like any others
    assert dp_scaled_dot_product_attention(q, k, v, mask, **PRIVATE, ledger=ledger)[1].all()


NO_WINDOWS = """
    from dpfa_mechanisms.low_rank import LowRank

    class Plugin(LowRank):
        name = "banded"

        def supports(self, spec, problem):
            reasons = super().supports(spec, problem)
            if problem.window != (-1, -1):
                reasons += (f"banded noise has no place for window={problem.window}; leave the window out.",)
            return reasons
"""


def test_a_window_with_a_structure_that_cannot_serve_it_is_refused(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, third_party: Callable[[str, str], None]
) -> None:
    third_party("banded", NO_WINDOWS)
    qkv = inputs(D=16)
    with pytest.raises(PrivacyParameterError, match=r"cannot keep this promise: banded noise has no place for window"):
        dp_flash_attn_func(*qkv, **PRIVATE, window_size=(2, 0), mechanism="banded(rank=4)", ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0
    dp_flash_attn_func(*qkv, **PRIVATE, mechanism="banded(rank=4)", ledger=ledger)


@pytest.mark.parametrize("structure", ["low_rank(rank=4)", "sparse", "block_diagonal", "attention_aware"])
def test_the_structures_that_come_along_serve_windows(inputs: Callable[..., Any], structure: str) -> None:
    options: dict[str, Any] = TOKEN | {"logit_bound": 1.0, "window_size": (2, 1)}
    out, stats = dp_flash_attn_func(
        *inputs(D=16, S=12), **PRIVATE, **options, noise_structure=structure, return_privacy_stats=True
    )
    assert out.isfinite().all()
    assert 0.99 < stats.epsilon_spent <= 1.0
