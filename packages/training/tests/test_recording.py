import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_models import TinyViT, assert_exact, images, per_sample_loss

from dpfa_core.errors import NotPrivateError
from dpfa_training import clipped_gradients
from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.recording import Recording
from dpfa_training.tape import Tape

REFUSED = {
    "couples the samples": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "LSTM, which keeps its weights out of sight": nn.Sequential(nn.LSTM(4, 4)),
    "is compiled": nn.Sequential(torch.compile(nn.Linear(4, 4))),
    "must be float32": nn.Sequential(nn.Linear(4, 2)).to(torch.bfloat16),
    "no parameter has requires_grad=True": nn.Sequential(nn.Linear(4, 2)).requires_grad_(False),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_covered_is_refused_by_name(text):
    with pytest.raises(NotPrivateError, match=text.replace("(", r"\(")):
        Recording(REFUSED[text])


def test_frozen_parts_need_no_rule():
    module = nn.Sequential(nn.LSTM(4, 4).requires_grad_(False), nn.Linear(4, 2))
    assert set(Recording(module).parameters) == {"1.weight", "1.bias"}


def test_a_subclass_is_recorded_as_what_it_computes():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert_exact(nn.Sequential(Doubled(4, 2)), lambda m, x: m(x).square().sum(1), torch.randn(5, 4))


def started(module, batch):
    """A recorded forward whose backward has not run: (recording, tape, loss)."""
    recording = Recording(module)
    rows = len(batch[0])
    recording.survey(lambda picked: per_sample_loss(module, [x[picked] for x in batch]), rows)
    seen = {}
    tape = Tape(rows, lambda tape: seen.update(dict(tape.merged())))
    recording.start(tape)
    loss = per_sample_loss(module, batch).sum()
    recording.recorded(loss)
    return recording, tape, loss, seen


def held(module):
    return [type(p) for layer in module.modules() for p in layer._parameters.values() if p is not None]


def test_between_forward_and_backward_the_module_holds_its_own_parameters():
    module, batch = TinyViT(), images(3)
    own = {name: id(p) for name, p in module.named_parameters()}
    _, _, loss, seen = started(module, batch)
    assert {name: id(p) for name, p in module.named_parameters()} == own
    assert set(held(module)) == {nn.Parameter}
    twin = copy.deepcopy(module)
    torch.save(module.state_dict(), io.BytesIO())
    loss.backward()
    assert set(held(module)) == {nn.Parameter}
    assert seen.keys() == own.keys()
    assert all(p.grad is None for p in twin.parameters())


def test_a_proxy_copies_and_pickles_as_its_parameter():
    module, batch = TinyViT(), images(3)
    recording, tape, _, _ = started(module, batch)
    recording.start(Tape(3, lambda tape: None))  # as a backward that failed would leave it
    assert issubclass(type(module.head.weight), Proxy)
    assert isinstance(module.head.weight, nn.Parameter)
    assert set(held(copy.deepcopy(module))) == {nn.Parameter}
    assert set(held(pickle.loads(pickle.dumps(module)))) == {nn.Parameter}  # noqa: S301
    recording.stop()
    recording.stop()
    assert set(held(module)) == {nn.Parameter}
    assert not tape.closed


def test_an_exception_in_the_forward_leaves_the_module_as_it_was():
    module = TinyViT()
    with pytest.raises(RuntimeError):
        clipped_gradients(module, lambda m, x: m(x[:, :, :3]).sum(1), torch.randn(4, 1, 8, 8), max_grad_norm=1.0)
    assert set(held(module)) == {nn.Parameter}


class Checkpointed(nn.Module):
    """Two blocks that are computed again in the backward pass; the second one twice."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())
        self.scale = nn.Parameter(torch.randn(6))
        self.reentrant = reentrant

    def inner(self, x):
        return x + self.block(x) * self.scale

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.last(x).square().sum((1, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4)
    module = Checkpointed(reentrant)
    plain = copy.deepcopy(module)
    plain.inner, plain.reentrant = None, None
    plain.forward = lambda y: _plain_forward(plain, y)
    sums, norms = clipped_gradients(module, lambda m, y: m(y), x, max_grad_norm=0.7)
    truth, exact = clipped_gradients(plain, lambda m, y: m(y), x, max_grad_norm=0.7)
    torch.testing.assert_close(norms, exact)
    for name in truth:
        torch.testing.assert_close(sums[name], truth[name])
    assert set(held(module)) == {nn.Parameter}


def _plain_forward(module, x):
    x = module.first(x)
    for _ in range(2):
        x = x + module.block(x) * module.scale
    return module.last(x).square().sum((1, 2))


def test_bfloat16_autocast_never_reads_a_norm_far_too_small():
    torch.manual_seed(0)
    module, batch = TinyViT(), images(16)
    seen = {}

    def rounded(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = m(b[0])
        seen["dtype"] = logits.dtype
        return F.cross_entropy(logits.float(), b[1], reduction="none")

    sums, norms = clipped_gradients(module, rounded, batch, max_grad_norm=math.inf)
    assert seen["dtype"] == torch.bfloat16
    for index in range(16):  # what autograd makes of the same rounded passes, one sample at a time
        loss = rounded(module, [x[index : index + 1] for x in batch]).sum()
        found = torch.autograd.grad(loss, list(module.parameters()))
        norm = torch.cat([g.double().flatten() for g in found]).norm()
        assert norm * (1 - 2**-7) <= norms[index] <= norm * (1 + 2**-5)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    exact = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=math.inf)[0]
    size = torch.cat([value.flatten() for value in exact.values()]).norm()
    assert torch.cat([(sums[name] - exact[name]).flatten() for name in exact]).norm() < 0.02 * size


def test_float16_autocast_is_refused_with_the_remedy():
    def losses(m, b):
        return per_sample_loss(m, b)

    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(NotPrivateError, match=r"torch\.bfloat16"):
        clipped_gradients(TinyViT(), losses, images(3), max_grad_norm=1.0)
