"""Gradients of a release: finite differences, projections of clipped rows, nothing from the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_core.spec import NoisePlan
from dpfa_kernels_torch import TorchBackend, attention

SCALE = 0.4

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "value clip": {"clip_norm": 1.5},
    "output clip": {"clip": "output", "clip_norm": 0.6},
    "logit bound": {"logit_bound": 0.8, "clip_norm": 1.5, "causal": True},
    "large logit bound": {"logit_bound": 50.0},
    "lengths": {"lengths": ((3, 2), (0, 4)), "causal": True, "clip_norm": 1.5},
    "mask": {"mask": bytes([0b10110001, 0b10100000]), "clip_norm": 1.5, "causal": True},
    "window": {"window": (1, 0), "clip": "output", "clip_norm": 0.6},
}


class Release(torch.autograd.Function):
    """A release as autograd sees it, with fixed noise."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, problem: Any, plan: Any, key: Any) -> torch.Tensor:
        out, ctx.saved = TorchBackend().release(q, k, v, problem, plan, None, key, softmax_scale=SCALE)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        return *TorchBackend().release_backward(dout, ctx.saved), None, None, None


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_match_finite_differences(
    problem: Callable, inputs: Callable, plan: Callable, release_key: Callable, case: str, norm: str
) -> None:
    sizes = {"batch": 2, "q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3}
    shape = problem(**{**sizes, **CASES[case]}, dtype="float64")
    noisy = plan(norm=norm) if shape.clip_norm else plan(distribution="none", head_scale=(0.0,), norm=norm)
    tensors = [x.requires_grad_() for x in inputs(shape, seed=2)]
    assert torch.autograd.gradcheck(Release.apply, (*tensors, shape, noisy, release_key()), atol=1e-6)


def test_blocks_do_not_change_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    noiseless: NoisePlan,
) -> None:
    shape = problem(dtype="float64", causal=True, clip="output", clip_norm=0.5, lengths=((7, 9), (4, 3)))
    tensors = inputs(shape)
    out, saved = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    whole = backend.release_backward(out + 1, saved)
    monkeypatch.setattr(attention, "LOGITS", 4 * 9 * 2)
    for found, expected in zip(backend.release_backward(out + 1, saved), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_clipped_value_rows_get_no_gradient_along_themselves(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    """A clipped row's norm does not matter, so the gradient is orthogonal to it."""
    shape = problem(dtype="float64", clip_norm=0.1)
    q, k, v = inputs(shape)
    out, saved = backend.release(q, k, v, shape, noiseless, None, None, softmax_scale=SCALE)
    _, _, dv = backend.release_backward(torch.randn_like(out), saved)
    assert dv.norm() > 0
    torch.testing.assert_close((dv * v).sum(-1), torch.zeros(v.shape[:-1], dtype=v.dtype), atol=1e-12, rtol=0)


def test_noise_does_not_change_the_gradients(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, release_key: Callable
) -> None:
    shape = problem(clip_norm=1.0, clip="output")
    tensors = inputs(shape)
    grads = []
    for release in range(2):
        out, saved = backend.release(*tensors, shape, plan(), None, release_key(release=release), softmax_scale=SCALE)
        grads.append(backend.release_backward(torch.ones_like(out), saved))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("clip", ["value", "output"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_non_finite_inputs_leave_finite_gradients(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan, clip: str, bad: float
) -> None:
    shape = problem(clip=clip, clip_norm=1.0, logit_bound=1.0)
    tensors = inputs(shape)
    for position, x in enumerate(tensors):
        x[1, position, 1, 2] = bad
    out, saved = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    for position, grad in enumerate(backend.release_backward(torch.ones_like(out), saved)):
        assert torch.isfinite(grad).all()
        if bad != 3e38 or (position == 2 and clip == "value"):
            assert (grad[1, position, 1] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_have_the_inputs_dtype(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan, dtype: str
) -> None:
    shape = problem(dtype=dtype)
    tensors = inputs(shape)
    out, saved = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    for grad, x in zip(backend.release_backward(out, saved), tensors, strict=True):
        assert grad.dtype == x.dtype
        assert grad.shape == x.shape
