from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.autograd import Release, release
from dpfa_core import selection
from dpfa_core.ledger import Ledger
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.noise.keys import KeySource

SHAPE: dict[str, Any] = {"batch": 1, "q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3}


def small(inputs: Callable[..., Any]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs(B=1, S=3, H=2, D=3, Sk=4, Hk=1, dtype=torch.float64)]


@pytest.mark.parametrize("clip", ["value", "output"])
def test_gradient_at_fixed_noise_is_that_of_the_clipped_attention(inputs: Callable[..., Any], clip: Any) -> None:
    problem = AttentionProblem(**SHAPE, causal=True, clip=clip, clip_norm=0.9, logit_bound=1.0, dtype="float64")
    plan = NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(2.0,), transform="bm64")
    key, backend = KeySource(3).next_release(), selection.backend("torch")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Release.apply(q, k, v, problem, plan, key, backend, 0.5)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, small(inputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 0.8},
        {"clip_norm": 0.5, "window_size": (1, 0)},
        {"clip": "output", "clip_norm": 0.2},
    ],
)
def test_gradient_of_the_call_in_float64(inputs: Callable[..., Any], ledger: Ledger, options: dict[str, Any]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dp_flash_attn_func(q, k, v, epsilon=math.inf, delta=0.0, ledger=ledger, **options)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(call, small(inputs))


def test_noise_changes_no_gradient(inputs: Callable[..., Any], ledger: Ledger) -> None:
    grads = []
    for epsilon in (1.0, math.inf):
        q, k, v = (x.requires_grad_() for x in inputs())
        out = dp_flash_attn_func(q, k, v, epsilon=epsilon, delta=1e-5, clip_norm=1.0, ledger=ledger)
        grads.append(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    for noised, exact in zip(*grads, strict=True):
        assert torch.equal(noised, exact)


def test_only_what_asks_for_a_gradient_is_on_the_tape(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    private: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "ledger": ledger}
    assert not dp_flash_attn_func(q, k, v, **private).requires_grad
    k.requires_grad_()
    with torch.no_grad():
        assert not dp_flash_attn_func(q, k, v, **private).requires_grad
    dp_flash_attn_func(q, k, v, **private).sum().backward()
    assert k.grad is not None
    assert q.grad is None


def test_input_changed_after_the_call_is_noticed(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    q.requires_grad_()
    out = dp_flash_attn_func(q, k, v, epsilon=1.0, delta=1e-5, ledger=ledger)
    v.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_whatever_a_backend_saves_comes_back(inputs: Callable[..., Any]) -> None:
    class Other:
        def release(self, q: Tensor, *rest: Any, **more: Any) -> Any:
            return q.clone(), {"text": "kept", "pair": (q * 2, [q * 3, None])}

        def release_backward(self, dout: Tensor, saved: Any) -> Any:
            assert saved["text"] == "kept"
            assert saved["pair"][1][1] is None
            return dout * saved["pair"][0], dout * saved["pair"][1][0], dout

    q, k, v = (x.requires_grad_() for x in inputs())
    nothing: Any = None
    plan = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,))
    release(q, k, v, nothing, plan, nothing, Other(), 1.0).sum().backward()  # type: ignore[arg-type]
    assert torch.equal(q.grad, 2 * q)  # type: ignore[arg-type]
    assert torch.equal(k.grad, 3 * q)  # type: ignore[arg-type]
