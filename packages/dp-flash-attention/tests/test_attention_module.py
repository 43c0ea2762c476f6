"""The attention module inside private training, and releases beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_flash_attention import (
    DPCheckpointedAttention,
    DPFlashAttention,
    Ledger,
    check_release_paths,
    clipped_gradients,
    engine_of,
    make_private,
)
from dp_flash_attention.privacy import RenyiAccountant
from dpfa_core.errors import NotPrivateError


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DPFlashAttention(8, 2, 1.0, 1e-5, setting="training", causal=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).mean(1))  # type: ignore[no-any-return]


def test_in_training_the_engine_spends_and_each_forward_is_pending() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 5, 8), torch.arange(24) % 2)
    model = Classifier()
    with pytest.raises(NotPrivateError, match="inside an engine"):
        model(data.tensors[0][:2])
    module, optimizer, loader = make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        ledger=Ledger.memory(unit="example", relation="add_or_remove", delta=1e-5),
    )
    before = [x.detach().clone() for x in module.parameters()]
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))
    spent = module.attention.get_privacy_spent()
    assert float(spent) == engine_of(module).get_epsilon() > 0.0
    assert spent["total_delta"] == 1e-5
    stats = module.attention.eval()(data.tensors[0][:2], return_privacy_stats=True)[1]
    assert stats.scope == "pending_step"
    # what a training forward returns has no noise at all
    assert not check_release_paths(module.eval(), data.tensors[0][:2])


def test_recomputed_attention_has_the_per_sample_gradients_of_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain, ours = Classifier(), Classifier()
    ours.attention = DPCheckpointedAttention(8, 2, 1.0, setting="training", causal=True)
    ours.load_state_dict(plain.state_dict())
    batch = torch.randn(6, 5, 8), torch.arange(6) % 2

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    expected, found = (
        clipped_gradients(model.eval(), losses, batch, max_grad_norm=0.5, reduction="sum") for model in (plain, ours)
    )
    torch.testing.assert_close(found[1], expected[1])
    torch.testing.assert_close(list(found[0].values()), list(expected[0].values()))
    assert "once for each sample" not in caplog.text


def test_a_report_of_spending_is_a_step_that_an_accountant_counts_once() -> None:
    module = DPFlashAttention(8, 2, 0.5, 1e-6, ledger=Ledger.memory())
    module(torch.randn(2, 5, 8))
    spent, book = module.get_privacy_spent(), RenyiAccountant()
    for _ in range(3):
        book.add_step(spent, sampling_rate=1.0)
    assert 0.49 < book.get_epsilon(delta=1e-5) < 0.51
