"""What ``torch.compile`` does to a private model: nothing that changes a gradient, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfa_core.errors import NotPrivateError
from dpfa_training import make_private


def trained(compiled: str) -> list[Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    if compiled == "in place, before":
        module.compile(backend="eager")
    if compiled == "a layer":
        module[0].compile(backend="eager")
    data = TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,)))
    module, optimizer, loader = make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.5,
        max_grad_norm=0.5,
        seed=1,
    )
    called = torch.compile(module, backend="eager") if compiled == "around it, after" else module
    for x, y in loader:
        F.cross_entropy(called(x), y).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
@pytest.mark.parametrize("compiled", ["in place, before", "a layer", "around it, after"])
def test_a_compiled_private_model_takes_the_same_steps(compiled: str) -> None:
    for ours, plain in zip(trained(compiled), trained(""), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_module_wrapped_by_compile_beforehand_is_refused_by_name() -> None:
    module = torch.compile(nn.Linear(4, 3))
    with pytest.raises(NotPrivateError, match=r"pass the module as it was before torch\.compile"):
        make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
            data_loader=DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=8),
            noise_multiplier=0.5,
            max_grad_norm=0.5,
        )
