"""A row that holds an infinity or NaN counts as zeros: in silence, in every layout, forward and backward.

An exception, a warning or a count would itself be a release (PRIVACY P2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import (
    dp_flash_attn_func,
    dp_flash_attn_qkvpacked_func,
    dp_flash_attn_varlen_func,
    dp_flash_attn_with_kvcache,
    dp_scaled_dot_product_attention,
)
from dpfa_core.ledger import Ledger

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BAD = [math.inf, -math.inf, math.nan]
PLACE = (1, 2, 3)
"""Batch row, token and head of the bad row."""


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return dp_flash_attn_func(q, k, v, **options)


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    ends = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    packed = dp_flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, q.shape[1], q.shape[1], **options
    )
    return packed.unflatten(0, q.shape[:2])


def qkvpacked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return dp_flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **options)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return dp_scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def kvcache(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return dp_flash_attn_with_kvcache(q, k, v, **options)


LAYOUTS = [dense, varlen, qkvpacked, sdpa, kvcache]


def with_bad_row(x: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """`x` with one bad number, and `x` with zeros in its row."""
    bad, zeroed = x.clone(), x.clone()
    bad[(*PLACE, 1)], zeroed[PLACE] = value, 0.0
    return bad, zeroed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", ["value", "output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_row_is_a_row_of_zeros(
    inputs: Callable[..., Any], ledger: Ledger, layout: Callable[..., Any], clip: str, dtype: torch.dtype
) -> None:
    plain: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0, "clip": clip, "clip_norm": 1.0, "logit_bound": 2.0}
    whole = inputs(dtype=dtype)
    calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for which in range(3):
            for value in BAD:
                bad, zeroed = list(whole), list(whole)
                bad[which], zeroed[which] = with_bad_row(whole[which], value)
                found = layout(*bad, **plain, ledger=ledger)
                assert torch.equal(found, layout(*zeroed, **plain, ledger=ledger))
                assert layout(*bad, epsilon=1.0, delta=1e-5, clip=clip, ledger=ledger).isfinite().all()
                calls += 3
    # charged like any other call
    assert sum(count for _, count in ledger.events()) == calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", ["value", "output"])
@pytest.mark.parametrize("logit_bound", [None, 2.0])
def test_gradients_are_finite_and_the_bad_row_has_none(
    inputs: Callable[..., Any], ledger: Ledger, clip: Any, logit_bound: float | None, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "clip": clip, "logit_bound": logit_bound}
    whole = inputs(dtype=dtype)
    for which in range(3):
        for value in BAD:
            grads = []
            for rows in with_bad_row(whole[which], value):
                qkv = [x.clone() for x in whole]
                qkv[which] = rows
                qkv = [x.requires_grad_() for x in qkv]
                out = dp_flash_attn_func(*qkv, **options, ledger=ledger)
                grads.append(torch.autograd.grad(out, qkv, torch.ones_like(out)))
            assert all(grad.isfinite().all() for grad in grads[0])
            assert not grads[0][which][PLACE].any()
            # every other row has the gradient that it has beside a row of zeros
            rest = torch.ones(whole[which].shape[:3], dtype=torch.bool)
            rest[PLACE] = False
            for index, (one, two) in enumerate(zip(*grads, strict=True)):
                assert torch.equal(*(x[rest] if index == which else x for x in (one, two)))


def test_a_row_whose_norm_overflows(inputs: Callable[..., Any], ledger: Ledger) -> None:
    options: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0, "clip_norm": 1.0, "ledger": ledger}
    # float16 is measured in float32, where the norm of its largest row is a number: clipped like any other
    q, k, v = inputs(dtype=torch.float16)
    huge, small = v.clone(), v.clone()
    huge[PLACE], small[PLACE] = 65504.0, 8**-0.5
    torch.testing.assert_close(
        dp_flash_attn_func(q, k, huge, **options), dp_flash_attn_func(q, k, small, **options), atol=2e-3, rtol=0
    )
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = inputs(dtype=dtype)
        huge, zeroed = v.clone(), v.clone()
        huge[PLACE], zeroed[PLACE] = 3e38, 0.0
        for clip in ("value", "output"):
            out = dp_flash_attn_func(q, k, huge, clip=clip, **options)
            assert out.isfinite().all()
            assert torch.linalg.vector_norm(out.double(), dim=-1).max() <= 1.01
        assert torch.equal(dp_flash_attn_func(q, k, huge, **options), dp_flash_attn_func(q, k, zeroed, **options))


def test_logits_that_overflow_count_as_zero(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    q[PLACE], k[1, 4, 3] = 1e30, 1e30
    for bound in (None, 1.0):
        qkv = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dp_flash_attn_func(*qkv, epsilon=1.0, delta=1e-5, logit_bound=bound, ledger=ledger)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), qkv))
