from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dpfa_attention.checkpointed_module import DPCheckpointedAttention
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.release_paths import check_release_paths
from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger

E, H = 16, 4
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "upstream_gradients": "allow"}


def words(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(segments: int, **options: Any) -> tuple[DPFlashAttention, DPCheckpointedAttention]:
    """The plain module and one that recomputes, with equal weights."""
    torch.manual_seed(0)
    plain = DPFlashAttention(E, H, **options, ledger=Ledger.memory())
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = DPCheckpointedAttention(E, H, **options, segments=segments, ledger=Ledger.memory())
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(module: DPFlashAttention, *inputs: Tensor, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*leaves, **arguments)
    (out * words(*out.shape, seed=9).to(out.dtype)).sum().backward()
    return out, [x.grad for x in (*leaves, *module.parameters()) if x.grad is not None]


@pytest.mark.parametrize("segments", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, [(5, 6, E)]),
        ({"causal": True, "unit": "token", "logit_bound": 1.0, "bias": False}, [(5, 6, E)]),
        ({"kdim": 10, "vdim": 7}, [(5, 6, E), (5, 4, 10), (5, 4, 7)]),
    ],
)
def test_gradients_are_those_of_the_plain_module(
    options: dict[str, Any], shapes: list[tuple[int, ...]], segments: int
) -> None:
    plain, ours = pair(segments, epsilon=math.inf, delta=0.0, clip_norm=0.7, upstream_gradients="allow", **options)
    inputs = [words(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected, theirs = gradients(plain, *inputs)
    out, found = gradients(ours, *inputs)
    assert torch.equal(out, expected)
    assert len(found) == len(theirs) >= 3
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_padding_is_cut_with_its_rows_and_only_what_asks_gets_a_gradient() -> None:
    plain, ours = pair(2, epsilon=math.inf, delta=0.0, causal=True, upstream_gradients="allow")
    padding = torch.arange(6) >= torch.tensor([6, 4, 1, 6, 3])[:, None]
    for module in (plain, ours):
        module.in_proj_weight.requires_grad_(False)  # type: ignore[union-attr]
    expected, theirs = gradients(plain, words(5, 6, E), key_padding_mask=padding)
    out, found = gradients(ours, words(5, 6, E), key_padding_mask=padding)
    torch.testing.assert_close([out, *found], [expected, *theirs], atol=1e-5, rtol=1e-5)
    assert ours.in_proj_weight.grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_sums_over_segments_are_rounded_once(autocast: bool) -> None:
    plain, ours = pair(3, epsilon=math.inf, delta=0.0, upstream_gradients="allow")
    x = words(6, 5, E, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, theirs = gradients(plain, x)
        out, found = gradients(ours, x)
    assert torch.equal(out, expected)
    torch.testing.assert_close(found, theirs, atol=0.2, rtol=0.03)


class Kept:
    """A tensor for as long as a tape holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(module: DPFlashAttention, x: Tensor) -> tuple[int, Tensor]:
    """Bytes that a forward keeps for its backward beside the parameters, and the output."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        alive.add(holder := Kept(tensor))
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = module(x)
    storages = {storage.data_ptr(): storage.nbytes() for held in alive for storage in [held.tensor.untyped_storage()]}
    for parameter in module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values()), out


def test_input_and_output_are_all_that_is_kept() -> None:
    plain, ours = pair(4, **PRIVATE)
    x = words(8, 32, E).requires_grad_()
    one = x.numel() * x.element_size()
    everything, _ = kept(plain, x)
    little, out = kept(ours, x)
    assert little == 2 * one
    assert everything >= 5 * one
    ours.checkpoint_gradients = False
    assert kept(ours, x)[0] == everything
    out.sum().backward()


def test_a_call_is_one_release_with_one_noise_however_often_it_is_recomputed() -> None:
    _, ours = pair(4, **PRIVATE)
    x = words(4, 6, E).requires_grad_()
    out, stats = ours(x, return_privacy_stats=True)
    ledger = ours._calls.ledger
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.autograd.grad(out.sum(), x)
    assert [line.id for line in ledger.releases()] == [stats.event_id]
    # inside torch's own checkpointing the forward runs again, too: its output must be the same noise, or the square's
    # gradient would be another one
    weight = ours.out_proj.weight.detach()

    def squared(x: Tensor) -> Tensor:
        return ours(x).square().sum()

    seen: list[Tensor] = []
    hook = ours.register_forward_hook(lambda module, arguments, result: seen.append(result.detach()))
    checkpoint(squared, x, use_reentrant=False).backward()  # type: ignore[no-untyped-call]
    hook.remove()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert len(list(ledger.releases())) == 2
    assert torch.equal(weight, ours.out_proj.weight)


def test_a_closed_tape_stays_closed() -> None:
    module = DPCheckpointedAttention(E, H, 1.0, segments=2, ledger=Ledger.memory())
    with pytest.raises(NotPrivateError, match="stop at the release"):
        module(words(2, 6, E)).sum().backward()
    module = DPCheckpointedAttention(E, H, 1.0, segments=2, upstream_gradients="block", ledger=Ledger.memory())
    module(words(2, 6, E)).sum().backward()
    assert module.in_proj_weight.grad is None  # type: ignore[union-attr]
    assert not check_release_paths(module, words(2, 6, E)).leaks
    module.upstream_gradients = "allow"
    report = check_release_paths(module, words(2, 6, E))
    assert [path.kind for path in report.leaks] == ["gradient"]
    assert len(list(module._calls.ledger.releases())) == 1


@pytest.mark.parametrize("mask", ["none", "for all", "each head", "padding"])
def test_training_recomputes_the_exact_attention(mask: str) -> None:
    plain, ours = (module.eval() for module in pair(1, setting="training"))
    ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
    arguments: dict[str, Any] = {
        "none": {},
        "for all": {"attn_mask": ahead},
        "each head": {"attn_mask": ahead.expand(5 * H, 5, 5)},
        "padding": {"key_padding_mask": torch.arange(5) >= torch.tensor([5, 4, 1, 5, 3])[:, None]},
    }[mask]
    expected, theirs = gradients(plain, words(5, 5, E), **arguments)
    out, found = gradients(ours, words(5, 5, E), **arguments)
    torch.testing.assert_close([out, *found], [expected, *theirs], atol=1e-5, rtol=1e-5)
    x = words(5, 5, E).requires_grad_()
    assert kept(ours, x)[0] < kept(plain, x)[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"segments": 0}, "segments must be an integer >= 1"),
        ({"segments": 2, "setting": "training"}, "max_physical_batch_size"),
        ({"checkpoint_gradients": 1}, "checkpoint_gradients must be True or False"),
    ],
)
def test_what_no_call_could_use_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        DPCheckpointedAttention(E, H, **options)


def test_noise_of_ones_own_is_not_recomputed() -> None:
    class Shift:
        def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
            return tensor + 1.0

    with pytest.raises(PrivacyParameterError, match="plans its noise, got 'Shift'"):
        DPCheckpointedAttention(E, H, noise_mechanism=Shift())
    assert DPCheckpointedAttention(E, H, noise_mechanism=Shift(), checkpoint_gradients=False).segments == 1
