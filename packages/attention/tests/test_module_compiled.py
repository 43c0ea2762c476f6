"""A module in a compiled graph: the same attention, noise of the same law, anew and charged at each run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention.checkpointed_module import DPCheckpointedAttention
from dpfa_attention.enhanced_module import EnhancedDPFlashAttention
from dpfa_attention.module import DPFlashAttention
from dpfa_core.ledger import Ledger

E, H = 16, 4


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A release between two layers, in one graph as far as the compiler can take it."""

    def __init__(self, attention: DPFlashAttention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.attention, self.after = nn.Linear(E, E), attention, nn.Linear(E, 2)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        out: Tensor = self.after(self.attention(self.before(x), **masks).relu())
        return out


def compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager")  # a compiler for C++ is not on every machine


@pytest.mark.parametrize("kind", [DPFlashAttention, EnhancedDPFlashAttention, DPCheckpointedAttention])
def test_without_noise_outputs_and_gradients_are_those_of_the_module(kind: type[DPFlashAttention]) -> None:
    model = Model(kind(E, H, math.inf, 0.0, upstream_gradients="allow", clip_norm=0.7, ledger=Ledger.memory()))
    x, bias = words(2, 5, E), words(5, 5)
    run = compiled(model)
    found = []
    for forward in (model, run):
        model.zero_grad()
        out = forward(x, attn_mask=bias)
        out.square().sum().backward()
        found.append([out, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_each_run_draws_new_noise_of_the_same_size_and_is_charged() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    attention = DPFlashAttention(E, H, 1.0, 1e-6, causal=True, ledger=ledger)
    nn.init.eye_(attention.out_proj.weight)
    exact = DPFlashAttention(E, H, math.inf, 0.0, causal=True, clip_norm=1.0, ledger=Ledger.memory())
    exact.load_state_dict(attention.state_dict())
    x = words(4, 40, E)
    run = compiled(attention)
    first, second = run(x), run(x)
    assert sum(count for _, count in ledger.events()) == 2
    report = attention.get_privacy_spent()
    assert report["forward_count"] == 2
    noise_std = attention(x, return_privacy_stats=True)[1].noise_std
    noise = torch.stack((first, second)).sub(exact(x)) / noise_std
    # 2560 numbers each: the mean square of that many is within 6 * sqrt(2 / 2560) of 1
    assert (noise.square().flatten(1).mean(1) - 1.0).abs().max() < 0.17
    assert (noise[0] * noise[1]).mean().abs() < 6.0 / math.sqrt(noise[0].numel())
