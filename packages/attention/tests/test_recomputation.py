"""Checkpointing recomputes a release with the noise it had, charges it once, and never lends noise to other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpfa_attention import dp_flash_attn_func, recomputation
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
KINDS = [{"use_reentrant": kind, "preserve_rng_state": rng} for kind in (False, True) for rng in (False, True)]


def spent(ledger: Ledger) -> int:
    return sum(count for _, count in ledger.events())


def leaves(inputs: Callable[..., Any], seed: int = 0) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs(seed=seed)]


class Seen:
    """A region that remembers what its releases were."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.outs: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dp_flash_attn_func(q, k, v, **PRIVATE, ledger=self.ledger)
        assert isinstance(out, Tensor)
        self.outs.append(out.detach().clone())
        return out.square()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_recomputed_noise_is_the_same_and_is_charged_once(
    inputs: Callable[..., Any], ledger: Ledger, kind: dict[str, bool]
) -> None:
    region = Seen(ledger)
    q, k, v = leaves(inputs)
    checkpoint(region, q, k, v, **kind).sum().backward()
    first, again = region.outs
    assert torch.equal(first, again)
    assert spent(ledger) == 1
    # the gradient is that of the numbers that were released
    plain = leaves(inputs)
    exact = dp_flash_attn_func(*plain, epsilon=float("inf"), delta=0.0, clip_norm=1.0)
    expected = torch.autograd.grad(exact, plain, 2 * first)
    for x, grad in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("kind", KINDS[::3], ids=str)
def test_a_second_forward_never_has_the_noise_of_the_first(
    inputs: Callable[..., Any], ledger: Ledger, kind: dict[str, bool]
) -> None:
    region = Seen(ledger)
    for _ in range(2):
        torch.manual_seed(0)
        checkpoint(region, *leaves(inputs), **kind).sum().backward()
    one, one_again, two, two_again = region.outs
    assert torch.equal(one, one_again)
    assert torch.equal(two, two_again)
    assert (one != two).all()
    assert spent(ledger) == 2


def test_layers_and_nested_regions_each_find_their_own(inputs: Callable[..., Any], ledger: Ledger) -> None:
    region = Seen(ledger)

    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(region, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inner(inner(q, k, v), k, v)

    q, k, v = leaves(inputs)
    x = q
    for _ in range(3):
        x = checkpoint(outer, x, k, v, use_reentrant=False)
    x.sum().backward()
    assert spent(ledger) == 6
    assert len({out.numpy().tobytes() for out in region.outs}) == 6
    assert len(region.outs) > 12


def test_released_features_train_what_comes_after_them(inputs: Callable[..., Any], ledger: Ledger) -> None:
    """No gradient goes into q, k and v, and the same numbers come again in every epoch."""
    region, weight = Seen(ledger), torch.ones(8, requires_grad=True)
    for _ in range(3):
        checkpoint(lambda *x: (region(*x) * weight).square(), *inputs(), use_reentrant=False).sum().backward()
        with torch.no_grad():
            checkpoint(region, *inputs(), use_reentrant=False)
    assert spent(ledger) == 6
    assert len({out.numpy().tobytes() for out in region.outs}) == 6


def test_other_numbers_never_get_the_noise(inputs: Callable[..., Any], ledger: Ledger, watched: Any) -> None:
    drift = iter([0.0, 1e-3])

    def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dp_flash_attn_func(q + next(drift), k, v, **PRIVATE, ledger=ledger).square()  # type: ignore[union-attr]

    out = checkpoint(region, *leaves(inputs), use_reentrant=False)
    with pytest.raises(NotPrivateError, match="got numbers that were not released there"):
        out.sum().backward()
    assert (spent(ledger), watched.calls) == (1, 1)


def test_equal_numbers_that_wait_together_are_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    region = Seen(ledger)
    out = checkpoint(lambda *x: region(*x) * region(*x), *leaves(inputs), use_reentrant=False)
    with pytest.raises(NotPrivateError, match="got 2 releases of equal numbers that wait"):
        out.sum().backward()
    assert spent(ledger) == 2


def test_a_new_call_inside_a_backward_pass_is_refused(inputs: Callable[..., Any], ledger: Ledger) -> None:
    q, k, v = leaves(inputs)
    q.register_hook(lambda grad: dp_flash_attn_func(grad, k, v, **PRIVATE, ledger=ledger))
    out = dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger)
    with pytest.raises(NotPrivateError, match="inside a backward pass must be the recomputation"):
        out.sum().backward()  # type: ignore[union-attr]
    assert spent(ledger) == 1


def test_only_so_many_are_remembered(
    inputs: Callable[..., Any], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recomputation, "REMEMBERED", 2)
    region = Seen(ledger)
    outs = [checkpoint(region, *leaves(inputs, seed), use_reentrant=False) for seed in range(3)]
    assert len(recomputation._tickets) == 2
    outs[2].sum().backward()
    with pytest.raises(NotPrivateError, match="not released there"):
        outs[0].sum().backward()


@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_checkpointing_and_compiling(inputs: Callable[..., Any], ledger: Ledger, compiler: str, kind: bool) -> None:
    torch._dynamo.reset()
    region = torch.compile(
        lambda *x: dp_flash_attn_func(*x, **PRIVATE, ledger=ledger).square(), backend=compiler, fullgraph=True
    )
    q, k, v = leaves(inputs)
    out = checkpoint(region, q, k, v, use_reentrant=kind)
    out.sum().backward()
    assert spent(ledger) == 1
    assert q.grad is not None

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inner = checkpoint(
            lambda *x: dp_flash_attn_func(*x, **PRIVATE, ledger=ledger).square(), q, k, v, use_reentrant=kind
        )
        return inner * 2.0  # type: ignore[no-any-return]

    torch.compile(whole, backend=compiler)(*leaves(inputs, 1)).sum().backward()
    assert spent(ledger) == 2
