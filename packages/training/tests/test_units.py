"""A user's rows are one sample: their gradients add up, then they are clipped together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dpfa_core.selection import backend
from dpfa_training.clipped_sums import ClippedSums
from dpfa_training.clipping import Clipping
from dpfa_training.recording import Recording
from dpfa_training.tape import Tape

UNITS = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
"""Three users with three, one and two rows, and two rows of padding."""
WEIGHTS = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0])


class Small(nn.Module):
    """An embedding, a position, a linear layer on positions and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.linear = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.table(ids) + self.position)).mean(1)


def per_user(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Each user's whole gradient by autograd, in float64."""
    found = []
    for user in range(3):
        model.zero_grad()
        rows = user == UNITS
        F.cross_entropy(model(ids[rows]), labels[rows], reduction="sum").backward()
        found.append({name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def test_a_users_rows_are_clipped_together() -> None:
    torch.manual_seed(3)
    model, ids, labels = Small(), torch.randint(0, 9, (8, 5)), torch.randint(0, 4, (8,))
    exact = per_user(model, ids, labels)
    norms = [sum(float(g.square().sum()) for g in user.values()) ** 0.5 for user in exact]
    threshold = sorted(norms)[1] * 0.9  # clips two of three
    sums: dict[str, torch.Tensor] = {}
    found: list[torch.Tensor] = []

    def finish(tape: Tape) -> None:
        clip = ClippedSums(backend("torch"), Clipping.flat(threshold))
        found.append(clip.add(tape, sums, weights=WEIGHTS, scale=8.0, units=UNITS))

    recording = Recording(model)
    recording.survey(lambda picked: model(ids[picked]), 4)
    with recording.to(Tape(8, finish)):
        F.cross_entropy(model(ids), labels).backward()
    torch.testing.assert_close(found[0][0, :3], torch.tensor(norms, dtype=torch.float64), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        expected = sum(user[name] * min(1.0, threshold / n) for user, n in zip(exact, norms, strict=True))
        torch.testing.assert_close(sums[name].reshape(parameter.shape).double(), expected, rtol=1e-5, atol=1e-6)
