import pytest
import torch
from torch import nn
from training_models import TinyText, TinyViT, images, texts

from dpfa_core.errors import NotPrivateError
from dpfa_core.selection import backend
from dpfa_training.per_sample import linear
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


def test_one_line_says_what_was_compared(caplog):
    caplog.set_level("INFO", "dpfa_training")
    check(TinyText(), texts(7)[0])
    (line,) = caplog.messages
    assert line.startswith("self-check passed: 4 samples have the gradients in a batch that they have alone, in all 8")
    caplog.clear()
    with pytest.raises(NotPrivateError):
        check(MeanOverBatch(), torch.randn(6, 4))
    assert not caplog.messages


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
        return right(self, kind, saved, method=method) * (0.5 if saved[-1].shape[1:] == (16,) else 1.0)

    monkeypatch.setattr(type(kernels), "sqnorm", half)
    with pytest.raises(NotPrivateError, match=r"norm\.weight|patch\.bias"):
        check(TinyViT(), images(6)[0])


def test_a_gradient_of_the_right_norm_in_another_direction_is_refused(monkeypatch):
    right = linear.token_sum
    monkeypatch.setattr(linear, "token_sum", lambda g: right(g).flip(1))
    with pytest.raises(NotPrivateError, match=r"'head\.bias'|'qkv\.bias'|'patch\.bias'"):
        check(TinyViT(), images(6)[0])


def test_a_sequence_that_comes_first_inside_is_found():
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.transpose(0, 1)).mean(0)

    assert check(SequenceFirst(), torch.randn(6, 5, 4)) == 4
    assert check(SequenceFirst(), torch.randn(4, 4, 4)) == 4


def test_coupling_that_leaves_the_norms_of_one_batch_right_is_refused():
    class ScaledByTheFirst(nn.Module):
        """The first sample sets the scale of all; alone, each is its own first."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * x[:1].norm().detach()

    with pytest.raises(NotPrivateError, match="samples influence one another"):
        check(ScaledByTheFirst(), torch.randn(6, 4) * torch.arange(1.0, 7.0)[:, None])


def test_one_sample_alone_is_a_check_of_nothing_more():
    assert check(TinyText(), texts(1)[0]) == 1
