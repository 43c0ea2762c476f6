from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfa_attention.functional import dp_flash_attn_func
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.release_paths import check_release_paths
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Laplace
from dpfa_core.ledger import Ledger
from dpfa_mechanisms.tensor_mechanism import DPMechanism

E = 8


class Block(nn.Module):
    """Norm, private attention, network; and what `more(self, x, released)` makes of it."""

    def __init__(self, more: Callable[..., Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.ledger = Ledger.memory(budget=1.0, delta=1e-5)
        self.attention = DPFlashAttention(E, 2, 1.0, 1e-5, ledger=self.ledger, **options)
        self.network = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, E))
        self.batch_norm = nn.BatchNorm1d(E)
        self.more = more or (lambda self, x, out: out)

    def forward(self, x: Tensor, **masks: Tensor) -> Any:
        out = self.attention(self.norm(x), **masks)
        # a residual after the release is post-processing
        return self.more(self, x, out + self.network(out))


class Model(nn.Module):
    """Embedding, block, head; `skip` leads from the embedding to the head."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.skip = nn.Embedding(9, E), Block(), nn.Linear(E, 3), skip

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        out = self.block(x)
        return {"logits": self.head(out + x if self.skip else out)}


def keep(self: Any, x: Tensor, out: Tensor) -> Tensor:
    self.attention.last = {"scores": torch.softmax(x @ x.mT, -1)}
    return out


def batch_statistics(self: Any, x: Tensor, out: Tensor) -> Tensor:
    self.batch_norm(x.transpose(1, 2))
    return out


def branch(self: Any, x: Tensor, out: Tensor) -> Tensor:
    return out * 2 if x.sum() > 0 else out


def own_buffer(self: Any, x: Tensor, out: Tensor) -> Tensor:
    preallocated = torch.zeros(2, 5, E)
    preallocated[:, 0].copy_(x[:, 0])
    return out + preallocated


PLANTED: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "residual": (lambda self, x, out: x + out, "output", "(the tensor returned)", "(top): add"),
    "returned log-sum-exp": (lambda self, x, out: (out, (x @ x.mT).logsumexp(-1)), "output", "[1]", "logsumexp"),
    "returned weights": (lambda self, x, out: (out, (x @ x.mT).softmax(-1)), "output", "[1]", "softmax"),
    "auxiliary loss": (lambda self, x, out: {"out": out, "loss": x.square().mean()}, "output", "['loss']", "mean"),
    "labels of a class": (lambda self, x, out: (out, x.detach().argmax(-1)), "output", "[1]", "argmax"),
    "batch-norm statistics": (batch_statistics, "buffer", "batch_norm.running_mean", "batch_norm: "),
    "kept scores": (keep, "attribute", "attention.last['scores']", "softmax"),
    "branch on a value": (branch, "python value", "in (top)", "(top): "),
    "written in place": (own_buffer, "output", "(the tensor returned)", "copy_"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_leak_is_found_with_its_place(name: str) -> None:
    more, kind, where, step = PLANTED[name]
    found = check_release_paths(Block(more), torch.randn(2, 5, E))
    assert not found
    leak = next(leak for leak in found.leaks if (leak.kind, leak.where) == (kind, where))
    assert leak.source == "input 0"
    assert any(step in each for each in leak.steps), leak
    assert where in str(found)
    assert found.releases == ("attention",)


def test_a_skip_from_the_embedding_is_found_through_integer_inputs() -> None:
    ids = torch.arange(6).reshape(2, 3)
    assert check_release_paths(Model(skip=False), ids)
    found = check_release_paths(Model(skip=True), ids=ids)
    (leak,) = found.leaks
    assert (leak.where, leak.source) == ("['logits']", "input 'ids'")
    assert leak.steps[0].startswith("embed: ")
    assert leak.steps[-1].startswith("head: ")
    assert not any(step.startswith("block") for step in leak.steps)


@pytest.mark.parametrize("choice", [None, "block", "allow"])
def test_a_sound_block_passes_and_the_check_costs_nothing(choice: Any) -> None:
    block = Block(upstream_gradients=choice)
    padding = torch.arange(5)[None].expand(2, 5) >= torch.tensor([[5], [3]])
    for _ in range(5):
        found = check_release_paths(block, torch.randn(2, 5, E, requires_grad=True), key_padding_mask=padding)
        assert bool(found) == (choice != "allow")
        assert [leak.kind for leak in found.leaks] == (["gradient"] if choice == "allow" else [])
    assert not list(block.ledger.releases())
    assert block.attention.get_privacy_spent()["forward_count"] == 0
    # afterwards a call is a release again
    assert block(torch.randn(2, 5, E)).any()
    assert len(list(block.ledger.releases())) == block.attention.get_privacy_spent()["forward_count"] == 1


def test_batch_norm_in_eval_and_after_the_release_leaks_nothing_and_buffers_come_back() -> None:
    block = Block(batch_statistics)
    assert check_release_paths(block.eval(), torch.randn(2, 5, E))
    block.train()
    assert not check_release_paths(block, torch.randn(2, 5, E))
    assert not block.batch_norm.running_mean.any()  # type: ignore[union-attr]
    after = Block(lambda self, x, out: self.batch_norm(out.transpose(1, 2)))
    assert check_release_paths(after, torch.randn(2, 5, E))


def test_a_module_without_a_release_leaks_and_a_public_input_does_not() -> None:
    found = check_release_paths(nn.Linear(E, E), torch.randn(2, E))
    assert [(leak.kind, leak.steps) for leak in found.leaks] == [("output", ("(top): addmm",))]
    assert "releases: none" in str(found)
    assert check_release_paths(nn.Linear(E, E), torch.randn(2, E), public_inputs=[0])


@pytest.mark.parametrize(
    ("module", "inputs", "public", "text"),
    [
        (F.relu, (torch.ones(2),), [], "module must be an nn.Module, got 'function'"),
        (nn.Identity(), (torch.ones(2),), [1], r"places or names of the inputs, \[0\], got '1'"),
        (nn.Identity(), (torch.ones(2),), ["memory"], "got \"'memory'\""),
        (nn.Identity(), (torch.ones(2),), "input", "got \"'input'\""),
        (nn.Identity(), (torch.ones(2).numpy(),), [], "inputs must hold a tensor to follow, got 'ndarray'"),
        (nn.Identity(), (), [], "inputs must hold a tensor to follow, got 'none'"),
    ],
)
def test_a_check_that_could_find_nothing_is_refused(module: Any, inputs: Any, public: Any, text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        check_release_paths(module, *inputs, public_inputs=public)


def test_a_release_by_the_function_counts_as_one() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor, memory: Tensor) -> Tensor:
            out = dp_flash_attn_func(q, memory, memory, epsilon=1.0, delta=1e-5, queries="public")
            assert isinstance(out, Tensor)
            return out + q

    q, memory = torch.randn(1, 3, 2, 4), torch.randn(1, 5, 2, 4)
    assert check_release_paths(Bare(), q, memory, public_inputs=[0])
    assert [leak.source for leak in check_release_paths(Bare(), q, memory).leaks] == ["input 0"]


def test_a_gradient_through_a_release_and_a_call_without_noise_are_leaks() -> None:
    class Projected(nn.Module):
        def __init__(self, epsilon: float) -> None:
            super().__init__()
            self.project, self.epsilon = nn.Linear(4, 4), epsilon

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            out = dp_flash_attn_func(x, x, x, epsilon=self.epsilon, delta=1e-5, clip_norm=1.0)
            assert isinstance(out, Tensor)
            return out

    x = torch.randn(1, 3, 2, 4)
    assert [leak.kind for leak in check_release_paths(Projected(1.0), x).leaks] == ["gradient"]
    with torch.no_grad():
        assert check_release_paths(Projected(1.0), x)
        found = check_release_paths(Projected(float("inf")), x)
    assert [leak.kind for leak in found.leaks if leak.kind == "output"] == ["output"]
    assert not found.releases


class Unpriced(DPMechanism):
    """Noise whose cost nobody states; `asked` counts how often it was asked for."""

    asked = 0

    def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
        self.asked += 1
        return tensor + torch.randn_like(tensor)


class Priced(Unpriced):
    norm = "l1"

    def dp_event(self, sensitivity: float, epsilon: float, delta: float) -> Laplace:
        return Laplace(1.001 / epsilon)


@pytest.mark.parametrize("mechanism", [Priced(), Unpriced()], ids=["priced", "unpriced"])
def test_a_mechanism_of_ones_own_ends_a_path_if_it_says_what_it_costs(mechanism: Unpriced) -> None:
    book = Ledger.memory(delta=1e-5)

    class Own(nn.Module):
        def __init__(self, around: bool = False) -> None:
            super().__init__()
            self.around = around

        def forward(self, x: Tensor) -> Tensor:
            out = dp_flash_attn_func(x, x, x, epsilon=1.0, delta=1e-5, mechanism=mechanism, ledger=book)
            assert isinstance(out, Tensor)
            return x + out if self.around else out

    x, priced = torch.randn(2, 5, 2, 4), isinstance(mechanism, Priced)
    found = check_release_paths(Own(), x)
    assert bool(found) == priced
    assert found.releases == (("(top)",) if priced else ())
    assert [leak.kind for leak in found.leaks] == ([] if priced else ["output"])
    # a way around it is found, and so is a gradient through it
    assert [leak.kind for leak in check_release_paths(Own(around=True), x).leaks] == ["output"]
    through = check_release_paths(Own(), x.clone().requires_grad_())
    assert [leak.kind for leak in through.leaks] == ["gradient" if priced else "output"]
    # nothing was charged, and the mechanism was asked for no noise
    assert not list(book.events())
    assert mechanism.asked == 0
    Own()(x)
    assert mechanism.asked == len(list(book.events())) == 1


def test_another_threads_release_is_a_release_during_a_check() -> None:
    other, outs = Block(), []

    def meanwhile(self: Any, x: Tensor, out: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: outs.append(other(torch.randn(2, 5, E))))
        thread.start()
        thread.join()
        return out

    assert check_release_paths(Block(meanwhile), torch.randn(2, 5, E))
    assert outs[0].any()
    assert len(list(other.ledger.releases())) == 1


def test_an_error_leaves_the_release_as_it_was() -> None:
    def broken(self: Any, x: Tensor, out: Tensor) -> Tensor:
        raise RuntimeError("broken")

    block = Block(broken)
    with pytest.raises(RuntimeError, match="broken"):
        check_release_paths(block, torch.randn(2, 5, E))
    assert block.attention(torch.randn(2, 5, E)).any()
    assert not block._forward_hooks
