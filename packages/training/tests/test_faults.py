"""Faults seen elsewhere that have no better place: each by the number it has in the list of them.

1, 10: test_clipping; 3: test_self_check and test_models; 5, 9: test_sampling_loader; 12, 13: test_private;
14: test_checkpoint; 15: test_private_figures.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import assert_exact

from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_training import clipped_gradients, engine_of, make_private


def losses_of(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(B,) cross-entropies."""
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def attached(module: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: object) -> tuple:
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "seed": 0} | options
    return make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=4),
        **settings,
    )


def test_fault_2_a_norm_under_bfloat16_autocast_neither_vanishes_nor_turns_nan() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 4))
    # positions share one large input: Gram matrices in low precision cancel to nothing here
    x, y = 30 + 0.2 * torch.randn(6, 32, 48), torch.randint(0, 4, (6,))

    def losses(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(module(batch[0]).mean(1).float(), batch[1], reduction="none")

    _, exact = clipped_gradients(module, losses, (x, y), max_grad_norm=1.0)

    def cast(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(module, batch)

    sums, found = clipped_gradients(module, cast, (x, y), max_grad_norm=1.0)
    assert bool((found > 0.9 * exact).all() and (found < 1.1 * exact).all())
    assert math.sqrt(sum(float(g.double().square().sum()) for g in sums.values())) <= 6.0


class Tied(nn.Module):
    """One table, looked up and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.table(ids)).mean(1), self.table.weight)


def test_fault_4_the_second_use_of_a_tied_table_does_not_hide_the_first() -> None:
    torch.manual_seed(0)
    module, ids, y = Tied(), torch.randint(0, 11, (5, 7)), torch.randint(0, 11, (5,))
    assert_exact(module, losses_of, (ids, y))
    sums, norms = clipped_gradients(module, losses_of, (ids[:1], y[:1]), max_grad_norm=0.1)
    assert float(norms[0]) > 0.1
    assert float(sums["table.weight"].norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("fault", [6, 11])
def test_faults_6_and_11_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotPrivateError, match="runs in one process in this version, got a group of 2"):
        attached(nn.Sequential(nn.Linear(3, 2)), torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))


class Branches(nn.Module):
    """Takes one of two ways, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.both = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.left(x) + (self.right(x) if self.both else 0.0)
        return self.head(torch.tanh(hidden))


def test_fault_7_a_branch_that_does_not_run_adds_nothing_of_the_batch_before() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    module, optimizer, loader = attached(Branches(), x, y, noise_multiplier=0.0, max_grad_norm=1e6)
    batches = iter(loader.draws(2))
    for both in (True, False):
        module.both = both
        a, b = next(batches)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        F.cross_entropy(module(a), b).backward()
        optimizer.step()
    assert torch.equal(module.right.weight, before["right.weight"])
    assert not torch.equal(module.left.weight, before["left.weight"])


def test_fault_7_four_dimensions_and_samples_that_are_not_finite() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Flatten(1), nn.Linear(24, 3))
    x, y = torch.randn(4, 2, 3, 5), torch.randint(0, 3, (4,))
    assert_exact(module, losses_of, (x, y))
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = math.inf
    keep = [0, 2, 3]
    whole, norms = clipped_gradients(module, losses_of, (spoilt, y), max_grad_norm=0.1)
    rest, _ = clipped_gradients(module, losses_of, (x[keep], y[keep]), max_grad_norm=0.1)
    assert not bool(norms[1].isfinite())
    for name, value in rest.items():
        torch.testing.assert_close(whole[name], value)
    module, optimizer, loader = attached(module, torch.cat([spoilt] * 4), torch.cat([y] * 4))
    for a, b in loader:
        F.cross_entropy(module(a), b).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert engine_of(module).non_finite_samples > 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_fault_8_attention_computes_the_same_function_private_or_not(batch_first: bool) -> None:
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x if batch_first else x.transpose(0, 1)
            out, _ = self.attention(x, x, x, need_weights=False)
            return self.head(out.mean(1 if batch_first else 0))

    module, x, y = Encoder(), torch.randn(16, 4, 8), torch.randint(0, 2, (16,))
    plain = module(x[:4]).detach()
    module, _, loader = attached(module, x, y, noise_multiplier=0.0)
    a, _ = next(iter(loader))
    torch.testing.assert_close(module(a).detach(), module.eval()(a).detach())
    torch.testing.assert_close(module(x[:4]).detach(), plain)


def test_fault_16_a_seed_is_told_to_be_worthless_and_keys_of_the_system_differ() -> None:
    x, y = torch.rand(8, 3), torch.zeros(8, dtype=torch.int64)
    keys = []
    for seed in (7, 7, None, None):
        ledger = Ledger.memory(unit="example", relation="add_or_remove")
        engine = engine_of(attached(nn.Sequential(nn.Linear(3, 2)), x, y, seed=seed, ledger=ledger)[0])
        key = engine.keys.key("training")
        keys.append((key.secure, key.words.tolist()))
    assert keys[0] == keys[1]
    assert [secure for secure, _ in keys] == [False, False, True, True]
    assert len({tuple(words) for _, words in keys}) == 3
