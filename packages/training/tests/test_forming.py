"""Per-sample gradients that are formed while backward runs, beside those formed after it and the exact ones."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_models import TinyText, TinyViT, clipped_truth, images, per_sample_loss, texts

from dpfa_core.selection import backend
from dpfa_training import clipped_gradients, clipped_sums, forming
from dpfa_training.clipped_sums import ClippedSums
from dpfa_training.clipping import Clipping
from dpfa_training.recording import Recording
from dpfa_training.tape import Note, Tape


class Tied(nn.Module):
    """A table that is looked up, multiplies the logits, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 12, padding_idx=1)
        self.twice = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = self.norm(x + torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return nn.functional.linear(x, self.table.weight).mean(1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False).mean(1))


def _tied():
    torch.manual_seed(3)
    return Tied(), (torch.randint(0, 23, (7, 30)), torch.randint(0, 23, (7,)))


def _checkpointed():
    torch.manual_seed(4)
    return Checkpointed(), (torch.randn(6, 20, 8), torch.randint(0, 3, (6,)))


CASES = {
    "vit": lambda: (TinyViT(), images(9)),
    "text": lambda: (TinyText(), texts(9)),
    "tied": _tied,
    "checkpointed": _checkpointed,
}

WAYS = {
    "during": {"BLOCK": 1 << 25, "SHORT": 0},
    "afterwards, in blocks": {"BLOCK": 1 << 10, "SHORT": 0},
    "never": {"BLOCK": 1, "SHORT": 0},
    "as it is": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_clipped_sums_are_the_same_by_every_way(case, way, monkeypatch):
    module, batch = CASES[case]()
    for name, value in WAYS[way].items():
        monkeypatch.setattr(forming, name, value)
    if "BLOCK" in WAYS[way]:
        monkeypatch.setattr(clipped_sums, "BLOCK", WAYS[way]["BLOCK"])
    sums, norms = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=0.3)
    truth, exact = clipped_truth(module, batch, 0.3)
    assert torch.all(norms >= exact * (1 - 1e-6))
    torch.testing.assert_close(norms, exact, rtol=1e-4, atol=0)
    error = sum((sums[n].double() - truth[n]).square().sum() for n in truth).sqrt()
    assert error / sum(truth[n].square().sum() for n in truth).sqrt() <= 1e-5


def _taped(module, batch, *, rows_fit=True):
    """The tape after a backward, and what it had formed."""
    recording = Recording(module)
    inputs, labels = batch
    with torch.enable_grad():
        recording.survey(lambda rows: module(inputs[rows]), 4, (inputs,))
    found = {}

    def finish(tape):
        found.update(notes=dict(tape.notes), formed=dict(tape.forming.gradients))

    tape = Tape(len(labels), finish)
    ClippedSums(backend("torch"), Clipping.flat(1.0)).form_during(tape)
    with recording.to(tape, (inputs,)):
        losses = nn.functional.cross_entropy(module(inputs), labels, reduction="none")
        tape.watch(losses)
    losses.sum().backward()
    return found


def test_what_is_formed_is_not_kept_as_notes():
    found = _taped(*_tied())
    assert found["formed"].keys() == {"table.weight", "twice.weight"}
    assert found["notes"].keys() == {"twice.bias", "norm.weight", "norm.bias"}


def test_nothing_is_formed_where_it_does_not_fit(monkeypatch):
    module, batch = _tied()
    weights = 23 * 12 + 12 * 12
    monkeypatch.setattr(forming, "BLOCK", 7 * weights)
    assert _taped(module, batch)["formed"]
    monkeypatch.setattr(forming, "BLOCK", 7 * weights - 1)
    assert not _taped(module, batch)["formed"]


def test_a_sample_that_is_not_finite_adds_nothing_to_what_was_formed():
    module, (x, y) = TinyViT(), images(5)
    alone, _ = clipped_gradients(module, per_sample_loss, (x[1:], y[1:]), max_grad_norm=0.5)
    x[0] = math.inf
    together, norms = clipped_gradients(module, per_sample_loss, (x, y), max_grad_norm=0.5)
    assert norms.isfinite().tolist() == [False, True, True, True, True]
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])


@pytest.mark.parametrize(("length", "formed"), [(1, False), (4, False), (64, True), (512, True)])
def test_short_sequences_take_the_gram_form(length, formed):
    note = Note("linear", (torch.empty(2, length, 256), torch.empty(2, length, 1024)))
    assert forming.is_formed(note) is formed
