"""A boolean mask becomes the packed one of a problem, and means the same on the way to the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention.pricing import priced_release
from dpfa_attention.problem import attention_problem, packed_mask
from dpfa_core import selection
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec

SILENT = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,), transform="bm64")


def shown() -> Tensor:
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[4] = False
    return mask


def masked(qkv: Any, mask: Tensor, **options: Any) -> AttentionProblem:
    defaults: dict[str, Any] = {"causal": False, "window": (-1, -1), "clip": "value", "clip_norm": None}
    return attention_problem(*qkv, **defaults | {"logit_bound": None} | options, mask=mask)


def silent(qkv: Any, problem: AttentionProblem) -> Tensor:
    out: Tensor = selection.backend("torch").release(*qkv, problem, SILENT, None, None, softmax_scale=0.3)[0]
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_release_is_masked_attention(inputs: Callable[..., Any], causal: bool) -> None:
    qkv, mask = inputs(), shown()
    out = silent(qkv, masked(qkv, mask, causal=causal))
    seen = mask.tril() if causal else mask
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in qkv), attn_mask=seen, scale=0.3
    )
    hidden = ~seen.any(-1)
    assert (out[:, hidden] == 0).all()
    torch.testing.assert_close(out[:, ~hidden], expected.transpose(1, 2)[:, ~hidden], rtol=1e-5, atol=1e-6)


def test_one_masked_token_moves_the_release_by_its_sensitivity_at_the_most(inputs: Callable[..., Any]) -> None:
    mask = shown()
    qkv = inputs(B=1, H=1)
    problem = masked(qkv, mask, clip_norm=1.0, logit_bound=0.5)
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="public")
    bound = priced_release(MECHANISMS.entry("gaussian"), None, spec, problem, 0.0).sensitivity
    assert bound is not None
    # every token of its own against all: the worst one, with the key that pulls hardest and values that oppose
    q, k, v = qkv
    q, k, largest = torch.ones_like(q) * 10, -torch.ones_like(k) * 10, 0.0
    for token in range(9):
        pulled = k.clone()
        pulled[:, token] = 10.0
        pair = []
        for sign in (1.0, -1.0):
            values = torch.zeros_like(v)
            values[:, token, 0, 0] = sign * 5
            pair.append(silent((q, pulled, values), problem))
        largest = max(largest, float((pair[0] - pair[1]).double().norm()))
    assert 0.999 * bound.value < largest <= bound.value


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(9, 8, dtype=torch.bool), r"mask must be bool \[9, 9\], True where a key is visible, got"),
        (torch.zeros(9, 9), r"got 'torch.float32 \[9, 9\], torch.strided'"),
        (torch.zeros(9, 9, dtype=torch.bool), "mask must show at least one key, got 'a mask that hides every key'"),
        (math.inf, "got 'float'"),
    ],
)
def test_what_is_no_mask_is_refused(mask: Any, text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        packed_mask(mask, 9, 9)
