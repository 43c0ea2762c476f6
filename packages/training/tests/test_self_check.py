import pytest
import torch
from torch import nn
from training_models import TinyText, TinyViT, images, texts

from dpfa_core.errors import NotPrivateError
from dpfa_core.selection import backend
from dpfa_training.recording import Recording
from dpfa_training.self_check import self_check


class MeanOverBatch(nn.Module):
    """Subtracts the batch mean: every sample moves every other one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0, keepdim=True))


class TokenMeanLoss(nn.Module):
    """A model that returns its own loss, averaged over all tokens of the batch."""

    def __init__(self, per_row: bool) -> None:
        super().__init__()
        self.words, self.head, self.per_row = nn.Embedding(40, 8), nn.Linear(8, 40), per_row

    def forward(self, ids):
        losses = nn.functional.cross_entropy(self.head(self.words(ids)).mT, ids, reduction="none")
        seen = (ids != 0).float()
        if self.per_row:
            return ((losses * seen).sum(1) / seen.sum(1)).mean()
        return (losses * seen).sum() / seen.sum()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


def check(module, *args):
    return self_check(Recording(module), backend("torch"), args, {}, len(args[0]), "mean")


@pytest.mark.parametrize(("module", "data"), [(TinyViT(), images), (TinyText(), texts)])
def test_supported_models_pass(module, data):
    assert check(module, data(7)[0]) == 4
    assert module.training


def test_dropout_is_switched_off_for_the_comparison_and_on_again():
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    assert check(module, torch.randn(6, 4)) == 4
    assert module[1].training


def test_coupled_samples_are_refused():
    with pytest.raises(NotPrivateError, match="samples influence one another"):
        check(MeanOverBatch(), torch.randn(6, 4))


def test_fault_3_token_mean_loss_is_refused():
    ids = torch.randint(1, 40, (5, 6))
    ids[0, 2:] = 0
    check(TokenMeanLoss(per_row=True), ids)
    with pytest.raises(NotPrivateError, match="normalised by other samples"):
        check(TokenMeanLoss(per_row=False), ids)


def test_unused_parameter_is_refused_by_name():
    with pytest.raises(NotPrivateError, match=r"spare\.weight"):
        check(Unused(), torch.randn(6, 4))


def test_a_wrong_rule_is_refused(monkeypatch):
    kernels = backend("torch")
    right = type(kernels).sqnorm

    def half(self, kind, saved, *, method="auto"):
        return right(self, kind, saved, method=method) * (0.5 if kind == "scale" else 1.0)

    monkeypatch.setattr(type(kernels), "sqnorm", half)
    with pytest.raises(NotPrivateError, match=r"norm\.weight"):
        check(TinyViT(), images(6)[0])


def test_batch_dimension_second_is_refused():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.transpose(0, 1)).mean(0)

    with pytest.raises(NotPrivateError, match="one row per sample in dimension 0"):
        check(SequenceFirst(), torch.randn(6, 5, 4))
