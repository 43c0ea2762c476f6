from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from dpfa_attention import dp_flash_attn_func, release_op
from dpfa_attention.autograd import release
from dpfa_attention.pricing import PricedRelease
from dpfa_attention.terms import Agreed, Terms
from dpfa_core import selection
from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_core.events import NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec

SHAPE: dict[str, Any] = {"batch": 1, "q_len": 3, "kv_len": 4, "q_heads": 2, "kv_heads": 1, "head_dim": 3}


def small(inputs: Callable[..., Any]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs(B=1, S=3, H=2, D=3, Sk=4, Hk=1, dtype=torch.float64)]


@pytest.mark.parametrize("clip", ["value", "output"])
def test_gradient_at_fixed_noise_is_that_of_the_clipped_attention(
    inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, clip: Any
) -> None:
    problem = AttentionProblem(**SHAPE, causal=True, clip=clip, clip_norm=0.9, logit_bound=1.0, dtype="float64")
    plan = NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(2.0,), transform="bm64")
    agree(monkeypatch, problem, plan)
    terms, ticket = some_terms(), torch.tensor([os.getpid(), 3, 0, 0])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return release(q, k, v, ticket, *terms)

    assert torch.autograd.gradcheck(call, small(inputs))
    q, k, v = small(inputs)
    assert not torch.equal(call(q, k, v), release(q, k, v, ticket + torch.tensor([0, 1, 0, 0]), *terms))


def agree(monkeypatch: pytest.MonkeyPatch, problem: AttentionProblem, plan: NoisePlan, backend: str = "torch") -> None:
    """Let the operators run this very plan, whatever terms they are given."""
    priced: Any = PricedRelease("gaussian", plan, NonPrivate(), 1.0, 1.0, 1.0, None)
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
    monkeypatch.setattr(release_op, "agreed", lambda *_: Agreed(spec, problem, priced, backend, 0.5))


def some_terms() -> Terms:
    return Terms(
        None, False, (-1, -1), 0.0, 1.0, 1e-5, "sequence", "replace", None, None, "value", None, "gaussian", None, None,
        False, "auto", None, 0, 0.0, (),
    )  # fmt: skip


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


def test_a_backend_that_saves_results_gets_them_back_without_noise(
    inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        plans: ClassVar[list[NoisePlan]] = []

        def release(
            self, q: Tensor, k: Tensor, v: Tensor, problem: Any, plan: NoisePlan, *rest: Any, **more: Any
        ) -> Any:
            self.plans.append(plan)
            return q.clone(), {"text": "kept", "pair": (q * 2, [q * 3, None])}

        def release_backward(self, dout: Tensor, saved: Any) -> Any:
            assert saved["text"] == "kept"
            assert saved["pair"][1][1] is None
            return dout * saved["pair"][0], dout * saved["pair"][1][0], dout.clone()

    q, k, v = (x.requires_grad_() for x in inputs())
    monkeypatch.setitem(selection._instances, "other", Other())
    agree(monkeypatch, cast(Any, None), NoisePlan(mechanism="x", distribution="gaussian", head_scale=(1.0,)), "other")
    release(q, k, v, torch.tensor([os.getpid(), 0, 0, 0]), *some_terms()).sum().backward()
    assert torch.equal(q.grad, 2 * q)  # type: ignore[arg-type]
    assert torch.equal(k.grad, 3 * q)  # type: ignore[arg-type]
    assert [plan.distribution for plan in Other.plans] == ["gaussian", "none"]


def test_a_ticket_of_another_process_is_refused(inputs: Callable[..., Any]) -> None:
    with pytest.raises(PrivacyParameterError, match="must be computed in the process that drew its noise"):
        release(*inputs(), torch.tensor([os.getpid() + 1, 0, 0, 0]), *some_terms())


def test_a_second_derivative_is_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    out = dp_flash_attn_func(q, k, v, epsilon=1.0, delta=1e-5, ledger=ledger)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotPrivateError, match="must be differentiated once, got a request for its second derivative"):
        torch.autograd.grad(dq.sum(), q)
