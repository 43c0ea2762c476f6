"""torch.func: gradients are the call's, mapped slices have noise of their own and cost what a loop costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.varlen import dp_flash_attn_varlen_func
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}


def spent(ledger: Ledger) -> int:
    return sum(count for _, count in ledger.events())


def stacked(inputs: Callable[..., Any], slices: int = 3) -> tuple[Tensor, ...]:
    parts = [inputs(S=5, seed=seed) for seed in range(slices)]
    return tuple(torch.stack(xs) for xs in zip(*parts, strict=True))


def test_grad_is_the_gradient_of_the_tape(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger).sum()  # type: ignore[union-attr]

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for one, two in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(one, two)
    assert spent(ledger) == 2


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (None, 0, None), (2, 1, 0)])
def test_a_mapped_call_is_a_loop_of_calls(inputs: Callable[..., Any], ledger: Ledger, dims: Any) -> None:
    whole = stacked(inputs)
    given = [x[0] if d is None else x.movedim(0, d) for x, d in zip(whole, dims, strict=True)]
    one_each = [torch.stack([x[0]] * 3) if d is None else x for x, d in zip(whole, dims, strict=True)]

    def silent(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return dp_flash_attn_func(q, k, v, epsilon=float("inf"), delta=0.0, clip_norm=1.0, causal=True)

    mapped = torch.func.vmap(silent, in_dims=dims)(*given)
    torch.testing.assert_close(mapped, torch.stack([silent(*x) for x in zip(*one_each, strict=True)]))
    torch.func.vmap(lambda *x: dp_flash_attn_func(*x, **PRIVATE, ledger=ledger), in_dims=dims)(*given)
    assert spent(ledger) == 3


def test_mapped_slices_of_equal_records_differ(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = (x.expand(2, 3, *x.shape) for x in inputs())
    out = torch.func.vmap(torch.func.vmap(lambda *x: dp_flash_attn_func(*x, **PRIVATE, ledger=ledger)))(q, k, v)
    slices = out.reshape(6, -1)
    assert all((slices[i] != slices[j]).all() for i in range(6) for j in range(i))
    assert spent(ledger) == 6
    assert len(list(ledger.releases())) == 1


def test_gradients_of_mapped_calls_and_mapped_gradients(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = stacked(inputs)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger).sum()  # type: ignore[union-attr]

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    total = torch.func.grad(lambda *x: torch.func.vmap(loss)(*x).sum(), argnums=(0, 1, 2))(q, k, v)
    for i in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i])
        for part, sum_, single in zip(each, total, alone, strict=True):
            torch.testing.assert_close(part[i], single)
            torch.testing.assert_close(sum_[i], single)


def test_lengths_are_mapped_with_their_rows(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = stacked(lambda **o: [x.flatten(0, 1) for x in inputs(**o)])  # ten packed rows
    ends = torch.tensor([0, 3, 10], dtype=torch.int32)

    def silent(q: Tensor, k: Tensor, v: Tensor) -> Any:
        plain: dict[str, Any] = {"epsilon": float("inf"), "delta": 0.0, "ledger": ledger}
        return dp_flash_attn_varlen_func(q, k, v, ends, ends, 7, 7, **plain)

    mapped = torch.func.vmap(silent)(q, k, v)
    torch.testing.assert_close(mapped, torch.stack([silent(*x) for x in zip(q, k, v, strict=True)]))


def test_forward_mode_is_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger), (q,), (q,))
