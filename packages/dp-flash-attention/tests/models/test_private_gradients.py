"""The engine against one-sample-at-a-time autograd in float64, on the models of the main job."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dp_flash_attention.models.bag_of_words import BagOfWords
from dp_flash_attention.models.text import TextTransformer
from dp_flash_attention.models.vit import VisionTransformer
from dpfa_training import clipped_gradients


def losses(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def words(rows: int) -> torch.Tensor:
    numbers = torch.randint(1, 200, (rows, 30))
    numbers[:, 20:] *= torch.randint(0, 2, (rows, 1))
    return numbers


CASES = {
    "vision transformer": (lambda: VisionTransformer(classes=10), lambda: torch.rand(12, 1, 8, 8)),
    "text transformer": (lambda: TextTransformer(classes=3, buckets=200), lambda: words(12)),
    "bag of words": (lambda: BagOfWords(classes=3, buckets=200), lambda: words(12)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.5, 10.0])
def test_clipped_sum_has_a_relative_error_of_at_most_1e_5(case: str, share: float) -> None:
    torch.manual_seed(0)
    build, inputs = CASES[case]
    module, x = build(), inputs()
    with torch.no_grad():  # away from the zero-initialised branches
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    y = torch.randint(0, 3, (len(x),))
    exact = copy.deepcopy(module).double()
    gradients = []
    for row, label in zip(x.double() if x.is_floating_point() else x, y, strict=True):
        loss = losses(exact, (row[None], label[None])).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]))
    norms = torch.stack(gradients).norm(dim=1)
    bound = float(norms.median()) * share  # half of the samples are clipped, or none
    truth = sum(g * min(1.0, bound / float(n)) for g, n in zip(gradients, norms, strict=True))
    sums, found = clipped_gradients(module, losses, (x, y), max_grad_norm=bound)
    ours = torch.cat([sums[name].flatten() for name, _ in module.named_parameters()]).double()
    assert torch.all(found >= norms * (1 - 1e-6))
    assert (ours - truth).norm() <= 1e-5 * truth.norm()
