"""Noise structures: what they release, that it is all noised, and how gradients pass through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_core.contracts import PlanTensors
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import NoisePlan, Structure
from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.clipping import clip_rows
from dpfa_kernels_torch.noise.release_noise import release_noise

SCALE = 0.4
KINDS = ("low_rank", "sparse", "block_diagonal")
PARAMETERS = {
    "low_rank": (("rank", 2.0),),
    "sparse": (("sparsity", 0.5), ("kept", 3.0), ("rescale", 1.0)),
    "block_diagonal": (("block_size", 3.0), ("condition", 16.0)),
}


def structured(kind: str, D: int = 5, **fields: Any) -> tuple[NoisePlan, PlanTensors]:
    """A plan of std 1/4 and tensors that any seed could have given."""
    generator = torch.Generator().manual_seed(3)

    def turn(width: int) -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]

    tensors = PlanTensors()
    if kind == "low_rank":
        basis = turn(D)[:, :2].float()
        tensors = PlanTensors(project=basis, mix=basis)
    elif kind == "sparse":
        keep = torch.eye(D)[:, [0, 2, 3]]
        tensors = PlanTensors(project=2.0 * keep, mix=keep)
    elif kind == "block_diagonal":
        roots, inverse = [], []
        for width in (3, D - 3):
            axes, root = turn(width), torch.logspace(0, math.log10(0.25), width, dtype=torch.float64)
            roots.append((axes * root) @ axes.T)
            inverse.append((axes / root) @ axes.T)
        tensors = PlanTensors(mix=torch.block_diag(*roots).float(), whiten=torch.block_diag(*inverse).float())
    base: dict[str, Any] = {
        "mechanism": kind,
        "distribution": "gaussian",
        "head_scale": (0.25,),
        "transform": "bm64",
        "norm": "whitened_l2" if kind == "block_diagonal" else "l2",
        "structure": Structure(kind=kind, parameters=PARAMETERS[kind], seed=3),  # type: ignore[arg-type]
    }
    return NoisePlan(**base | fields), tensors


def silent(kind: str) -> tuple[NoisePlan, PlanTensors]:
    return structured(kind, distribution="none", head_scale=(0.0,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_privatize_equals_release(
    backend: TorchBackend, problem: Callable, inputs: Callable, release_key: Callable, kind: str, dtype: str
) -> None:
    shape = problem(dtype=dtype, clip="output", clip_norm=0.4, causal=True)
    open_shape = problem(dtype="float64" if dtype == "float64" else "float32", causal=True)
    plan, tensors = structured(kind)
    rows, _ = backend.release(
        *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs(shape)),
        open_shape,
        NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,)),
        None,
        None,
        softmax_scale=SCALE,
    )
    whole, _ = backend.release(*inputs(shape), shape, plan, tensors, release_key(), softmax_scale=SCALE)
    fine = problem(dtype=str(rows.dtype).removeprefix("torch."), clip="output", clip_norm=0.4, causal=True)
    found = backend.privatize_(rows, fine, plan, tensors, release_key(), clip_rows=True).to(whole.dtype)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_projection_of_attention(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan, kind: str
) -> None:
    shape = problem()
    plan, tensors = silent(kind)
    rows, _ = backend.release(*inputs(shape), shape, noiseless, None, None, softmax_scale=SCALE)
    out, _ = backend.release(*inputs(shape), shape, plan, tensors, None, softmax_scale=SCALE)
    expected = rows if tensors.project is None else rows @ tensors.project @ tensors.mix.T
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_planned_covariance(
    backend: TorchBackend, problem: Callable, release_key: Callable, kind: str
) -> None:
    shape = problem(batch=8, q_len=500, clip_norm=1.0)
    plan, tensors = structured(kind)
    outs = [
        backend.privatize_(torch.zeros(8, 500, 4, 5), shape, plan, tensors, release_key(release=r), clip_rows=False)
        for r in range(3)
    ]
    noise = torch.cat(outs).double().flatten(0, 2)
    mix = tensors.mix.double()
    expected = 0.25**2 * mix @ mix.T
    found = noise.T @ noise / len(noise)
    # var of a product of jointly normal numbers is at most twice the product of their variances
    width = 5.0 * torch.sqrt(2.0 * torch.outer(expected.diagonal(), expected.diagonal()) / len(noise)) + 1e-12
    assert ((found - expected).abs() <= width).all()
    assert torch.linalg.matrix_rank(noise, rtol=1e-5) == mix.shape[1]


def test_a_low_rank_release_is_a_function_of_noised_numbers(
    backend: TorchBackend, problem: Callable, release_key: Callable
) -> None:
    """Bit by bit: what is lifted is the rounded sum, so no rounding of f survives outside the columns of U."""
    shape = problem(clip_norm=1.0)
    plan, tensors = structured("low_rank")
    x = torch.nn.functional.normalize(torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    noised = x @ tensors.project + release_noise(shape, plan, release_key())
    assert noised.shape[-1] == 2
    out = backend.privatize_(x.clone(), shape, plan, tensors, release_key(), clip_rows=False)
    assert torch.equal(out, noised @ tensors.mix.T)
    mutant = x @ tensors.project @ tensors.mix.T + release_noise(shape, plan, release_key()) @ tensors.mix.T
    assert not torch.equal(out, mutant)


@pytest.mark.parametrize("rounded_first", [True, False])
def test_outside_its_columns_a_low_rank_release_tells_neighbours_apart_no_better_than_inside(
    backend: TorchBackend, problem: Callable, release_key: Callable, rounded_first: bool
) -> None:
    """The attack that breaks f U U^T + Z U^T: look where there is no noise but rounding."""
    shape = problem(batch=20, q_len=500, clip_norm=1.0)
    plan, tensors = structured("low_rank", head_scale=(8.0,))
    U = tensors.mix.double()
    pair = torch.nn.functional.normalize(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    seen = []
    for side, row in enumerate(pair):
        x = row.expand(20, 500, 4, 5).contiguous()
        if rounded_first:
            x = backend.privatize_(x, shape, plan, tensors, release_key(release=side), clip_rows=False)
        else:
            x = x @ tensors.project @ tensors.mix.T
            x = x + (release_noise(shape, plan, release_key(release=side)) @ tensors.mix.T)
        rows = x.double().flatten(0, 2)
        outside = (rows - rows @ U @ U.T) * 2.0**22
        seen.append(torch.cat([rows @ U, outside], dim=-1))
    # a line fitted to one half, scored on the other
    fit, score = zip(*(torch.chunk(rows, 2) for rows in seen), strict=True)
    means = [rows.mean(0) for rows in fit]
    covariance = (torch.cov(fit[0].T) + torch.cov(fit[1].T)) / 2.0
    line = torch.linalg.lstsq(covariance, means[1] - means[0]).solution
    middle = (means[0] + means[1]) @ line / 2.0
    hits = [float((rows @ line > middle).double().mean()) for rows in score]
    advantage = hits[1] - hits[0]
    # two Gaussians at this distance are told apart no better than this
    most = math.erf(float((pair[1] - pair[0]).norm()) / 8.0 / 2.0 / math.sqrt(2.0))
    error = 4.0 / math.sqrt(2 * len(score[0]))
    if rounded_first:
        assert advantage <= most + error
    else:
        assert advantage > most + error


def test_a_difference_outside_the_columns_does_not_show(
    backend: TorchBackend, problem: Callable, release_key: Callable
) -> None:
    """Sparse columns make it exact: neighbours that agree there have the same output."""
    shape = problem(clip_norm=4.0)
    plan, tensors = structured("sparse")
    x = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[..., [1, 4]] = 0.7
    outs = [backend.privatize_(y.clone(), shape, plan, tensors, release_key(), clip_rows=False) for y in (x, other)]
    assert torch.equal(*outs)
    assert (outs[0][..., [1, 4]] == 0).all()
    kept = 2.0 * x[..., [0, 2, 3]] + release_noise(shape, plan, release_key())
    assert torch.equal(outs[0][..., [0, 2, 3]], kept)


@pytest.mark.parametrize("clip", ["value", "output"])
def test_rows_are_clipped_where_their_whitened_norm_is_too_long(
    backend: TorchBackend, problem: Callable, inputs: Callable, clip: str
) -> None:
    shape = problem(clip=clip, clip_norm=0.5)
    plan, tensors = silent("block_diagonal")
    out, _ = backend.release(*inputs(shape), shape, plan, tensors, None, softmax_scale=SCALE)
    lengths = (out.double() @ tensors.whiten.double()).norm(dim=-1)
    assert lengths.max() <= 0.5 * (1 + 1e-5)
    if clip == "output":
        assert lengths.max() > 0.499
    assert out.norm(dim=-1).max() < 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_row_whose_whitened_norm_is_not_finite_is_zero(bad: float) -> None:
    whiten = structured("block_diagonal")[1].whiten
    x = torch.ones(2, 5)
    x[0, 2] = bad
    x.requires_grad_()
    out = clip_rows(x, 0.5, "whitened_l2", whiten)
    assert (out[0] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(grad).all()
    assert (grad[0] == 0).all()


class Release(torch.autograd.Function):
    """A release as autograd sees it, with fixed noise."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, *rest: Any) -> Tensor:
        out, ctx.saved = TorchBackend().release(q, k, v, *rest, softmax_scale=SCALE)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return *TorchBackend().release_backward(dout, ctx.saved), None, None, None, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", ["value", "output"])
def test_gradients_match_finite_differences(
    problem: Callable, inputs: Callable, release_key: Callable, kind: str, clip: str
) -> None:
    sizes = {"batch": 1, "q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1}
    shape = problem(**sizes, dtype="float64", clip=clip, clip_norm=0.7, logit_bound=1.0, causal=True)
    plan, tensors = structured(kind)
    leaves = [x.requires_grad_() for x in inputs(shape, seed=2)]
    assert torch.autograd.gradcheck(Release.apply, (*leaves, shape, plan, tensors, release_key()), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "text"),
    [
        ("low_rank", "project", None, r"project must be a tensor \[5, 2\] on cpu, got 'NoneType'. It is made from"),
        ("low_rank", "mix", torch.zeros(5, 3), r"mix must be a tensor \[5, 2\] on cpu, got '\[5, 3\] on cpu'"),
        ("sparse", "whiten", torch.eye(5), r"whiten must be None, got '\[5, 5\] on cpu'"),
        ("block_diagonal", "whiten", None, r"whiten must be a tensor \[5, 5\] on cpu, got 'NoneType'"),
        ("block_diagonal", "project", torch.eye(5), r"project must be None"),
    ],
)
def test_tensors_of_another_structure_are_refused(
    backend: TorchBackend, problem: Callable, release_key: Callable, kind: str, name: str, tensor: Any, text: str
) -> None:
    plan, tensors = structured(kind)
    wrong = PlanTensors(**{n: getattr(tensors, n) for n in ("project", "mix", "whiten")} | {name: tensor})
    x = torch.zeros(2, 7, 4, 5)
    with pytest.raises(PrivacyParameterError, match=text):
        backend.privatize_(x, problem(clip_norm=1.0), plan, wrong, release_key(), clip_rows=False)


def test_heads_without_noise_are_released_as_they_are(
    backend: TorchBackend, problem: Callable, plan: Callable, release_key: Callable
) -> None:
    x = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(1))
    some = plan(head_scale=(0.25, 0.0, 0.5, 0.0), noiseless_heads=True)
    out = backend.privatize_(x.clone(), problem(clip_norm=4.0), some, None, release_key(), clip_rows=False)
    assert torch.equal(out[:, :, [1, 3]], x[:, :, [1, 3]])
    assert (out[:, :, [0, 2]] != x[:, :, [0, 2]]).all()
