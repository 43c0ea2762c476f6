import pytest
import torch
from torch import nn

from dpfa_core.errors import NotPrivateError
from dpfa_training.recording import Recording


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(4, 2)


REFUSED = {
    "couples the samples": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "must have shape": Scaled(),
    "'1.weight' of GroupNorm": nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)),
    "'0.in_proj_weight' of MultiheadAttention": nn.Sequential(nn.MultiheadAttention(4, 2)),
    "non-overlapping patches": nn.Sequential(nn.Conv2d(1, 2, 3, stride=1)),
    "scale_grad_by_freq": nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True)),
    "wrap it in nn.Sequential": nn.Linear(4, 2),
    "must be float32": nn.Sequential(nn.Linear(4, 2)).to(torch.bfloat16),
    "no parameter has requires_grad=True": nn.Sequential(nn.Linear(4, 2)).requires_grad_(False),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_covered_is_refused_by_name(text):
    with pytest.raises(NotPrivateError, match=text.replace("(", r"\(")):
        Recording(REFUSED[text])


def test_frozen_parts_need_no_rule():
    module = Scaled()
    module.scale.requires_grad_(False)
    assert set(Recording(module).parameters) == {"linear.weight", "linear.bias"}


def test_a_subclass_of_a_known_layer_is_not_taken_for_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NotPrivateError, match="Doubled"):
        Recording(nn.Sequential(Doubled(4, 2)))
