"""Gradient accumulation: in parts of one draw it is what physical batches do; over several draws it is refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_core.errors import NotPrivateError
from dpfa_training import engine_of, make_private


def private(**options):
    torch.manual_seed(0)
    module = TinyViT()
    return make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images(40)), batch_size=8),
        **{"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 2} | options,
    )


def test_accumulation_over_draws_is_refused_by_name_with_the_remedy():
    module, _opt, loader = private()
    rows = iter(loader)
    x, y = next(rows)
    nn.functional.cross_entropy(module(x), y).backward()
    with pytest.raises(NotPrivateError, match=r"gradient accumulation over draw 0.*max_physical_batch_size"):
        next(rows)


def test_parts_of_a_draw_accumulate_with_or_without_a_step_after_each():
    ends = []
    for every_part in (True, False):
        module, opt, loader = private(max_physical_batch_size=3)
        for x, y in loader:
            nn.functional.cross_entropy(module(x), y).backward()
            if every_part or engine_of(module)._batch.last:
                opt.step()
        ends.append(module.head.weight.detach().clone())
    assert torch.equal(*ends)
