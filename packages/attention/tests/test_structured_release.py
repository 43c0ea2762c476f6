"""Noise structures through the front door: priced, recorded, and what leaves is what was planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.pricing import priced_release
from dpfa_attention.sampler_end import cost_of_end, drawn_columns
from dpfa_attention.structure_tensors import structure_tensors
from dpfa_core.events import Composed
from dpfa_core.ledger import Ledger
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec
from dpfa_core.spending import upper_bound
from dpfa_mechanisms.gaussian import gaussian_delta

STRUCTURES = ("low_rank", "sparse", "block_diagonal", "attention_aware")
TOKEN: dict[str, Any] = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "unit": "token",
    "queries": "private",
    "logit_bound": 1.0,
    "causal": True,
}


def call(qkv: Any, ledger: Ledger, **options: Any) -> Any:
    return dp_flash_attn_func(*qkv, **TOKEN | options, ledger=ledger, return_privacy_stats=True)


@pytest.fixture
def tokens() -> Ledger:
    return Ledger.memory(unit="token", relation="replace", delta=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_structure_is_priced_recorded_and_differentiable(
    inputs: Callable[..., Any], tokens: Ledger, watched: Any, structure: str, dtype: torch.dtype
) -> None:
    qkv = [x.requires_grad_() for x in inputs(D=32, dtype=dtype)]
    out, stats = call(qkv, tokens, noise_structure=structure)
    assert (out.dtype, out.shape, stats.privacy_mechanism) == (dtype, qkv[0].shape, structure)
    assert 1.99 < stats.epsilon_spent <= 2.0
    ((event, count),) = tokens.events()
    assert count == 1
    # a price from the ledger alone, by an accountant that did not choose the noise
    assert upper_bound("pld", ((event, 1),), 1e-5) < 2.02
    (plan,) = watched.plans
    short = dtype != torch.float32 and structure in ("sparse", "attention_aware")
    assert plan.transform == "bm64" or short
    for grad in torch.autograd.grad(out.float().sum(), qkv):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("alias", [{"mechanism": "structured_noise"}, {"mechanism": "low_rank"}])
def test_names_for_a_structure_mean_the_same(
    inputs: Callable[..., Any], tokens: Ledger, watched: Any, alias: dict[str, Any]
) -> None:
    qkv = inputs(D=32)
    call(qkv, tokens, noise_structure="low_rank")
    call(qkv, tokens, **alias)
    assert watched.plans[0] == watched.plans[1]


def test_what_leaves_low_rank_and_sparse_noise_lies_in_the_public_columns(
    inputs: Callable[..., Any], tokens: Ledger, watched: Any
) -> None:
    for structure, columns in (("low_rank", 16), ("sparse", 3)):
        out, _ = call(inputs(D=32), tokens, noise_structure=structure)
        rows = out.detach().double().flatten(0, 2)
        assert torch.linalg.matrix_rank(rows, rtol=1e-5) == columns
    assert (out == 0).all(dim=(0, 1, 2)).sum() == 29


@pytest.mark.parametrize("structure", STRUCTURES[:3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_replaced_record_moves_the_noised_numbers_further_than_planned(
    inputs: Callable[..., Any], structure: str, dtype: str
) -> None:
    """In stds of the noise, on its own axes, one token moves the release by 1 / noise_multiplier at the most."""
    from dpfa_core import selection

    problem = AttentionProblem(
        batch=1,
        q_len=6,
        kv_len=6,
        q_heads=2,
        kv_heads=1,
        head_dim=32,
        clip_norm=1.0,
        logit_bound=1.0,
        causal=True,
        dtype=dtype,
    )
    spec = PrivacySpec(epsilon=2.0, delta=1e-5, unit="token", queries="private")
    priced = priced_release(MECHANISMS.entry(structure), None, spec, problem, 0.0)
    silent = NoisePlan(
        mechanism="none",
        distribution="none",
        head_scale=(0.0,),
        norm=priced.plan.norm,
        structure=priced.plan.structure,
        transform="bm64",
    )
    tensors = structure_tensors(priced.plan, problem, torch.device("cpu"))
    # from the output back to the numbers that got the noise
    back = tensors.whiten if tensors.project is None else tensors.mix
    largest = 0.0
    for seed in range(40):
        q, k, v = inputs(B=1, S=6, H=2, Hk=1, D=32, seed=seed, dtype=getattr(torch, dtype))
        v = v * 10
        pair = []
        for sign in (1, -1):
            q[:, 0], k[:, 0], v[:, 0] = (
                sign * 9 * torch.sign(k[:, 1]),
                sign * 9 * torch.sign(q[:, 1, :1]),
                sign * v[:, 0],
            )
            tensors = structure_tensors(silent, problem, q.device)
            out = selection.backend("torch").release(q, k, v, problem, silent, tensors, None, softmax_scale=0.5)[0]
            pair.append(out.double() @ back.double())
        largest = max(largest, float((pair[0] - pair[1]).norm()) / priced.plan.head_scale[0])
    assert 0.05 / priced.noise_multiplier < largest <= 1.0 / priced.noise_multiplier


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_end_of_the_sampler_is_charged_for_the_numbers_drawn(dtype: str) -> None:
    shape: dict[str, Any] = {"batch": 2, "q_len": 128, "kv_len": 128, "q_heads": 4, "kv_heads": 4, "head_dim": 64}
    problem = AttentionProblem(**shape, clip_norm=1.0, dtype=dtype)
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
    costs, columns = {}, {}
    for name in ("gaussian", *STRUCTURES[:3]):
        priced = priced_release(MECHANISMS.entry(name), None, spec, problem, 0.0)
        assert priced.sensitivity is not None
        ideal = gaussian_delta(1.0, priced.noise_multiplier)
        costs[name] = cost_of_end(
            priced.plan, problem, priced.sensitivity, noise_multiplier=priced.noise_multiplier, delta=ideal
        )
        assert 0.9e-5 < ideal + costs[name] <= 1e-5
        columns[name] = drawn_columns(priced.plan, problem)
        assert isinstance(priced.event, Composed)
    assert columns == {"gaussian": 64, "low_rank": 16, "sparse": 6, "block_diagonal": 64}
    if dtype == "float32":
        assert costs["low_rank"] < costs["gaussian"] == pytest.approx(costs["block_diagonal"], rel=1e-3)
        assert costs["sparse"] < costs["low_rank"]
    else:
        # where numbers are mixed, many short outputs show as much as one long one
        assert priced_release(MECHANISMS.entry("low_rank"), None, spec, problem, 0.0).plan.transform == "bm64"


def test_without_noise_a_structure_only_clips(inputs: Callable[..., Any], tokens: Ledger) -> None:
    qkv = inputs(D=32)

    def plain(**options: Any) -> Tensor:
        out, stats = call(qkv, tokens, epsilon=math.inf, **options)
        assert stats.epsilon_spent == math.inf
        return out

    for structure in STRUCTURES:
        assert torch.equal(plain(noise_structure=structure), plain())
    for structure in ("low_rank", "sparse", "attention_aware"):
        assert torch.equal(plain(noise_structure=structure, clip_norm=0.5), plain(clip_norm=0.5))
    whitened = plain(noise_structure="block_diagonal", clip_norm=0.5)
    assert whitened.norm(dim=-1).max() < plain(clip_norm=0.5).norm(dim=-1).max() <= 0.5
