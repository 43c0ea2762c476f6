"""A table that is looked up and multiplied with has one gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.per_sample import tied

ROWS, WIDTH, B = 11, 6, 4


def case(padding: int | None, S: int, T: int, pull: float) -> tuple[tuple[object, ...], torch.Tensor]:
    """(saved, exact gradients [B, ROWS, WIDTH]); `pull` near -1 makes the two parts cancel."""
    generator = torch.Generator().manual_seed(S + T)
    ids = torch.randint(0, ROWS, (B, S), generator=generator)
    g, hidden = (torch.randn(B, n, WIDTH, generator=generator) for n in (S, T))
    logits = torch.randn(B, T, ROWS, generator=generator)
    if pull:
        hidden, logits = g, pull * F.one_hot(ids, ROWS).float()
    grads = []
    for i in range(B):
        table = torch.zeros(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        looked_up = (F.embedding(ids[i], table, padding_idx=padding) * g[i].double()).sum()
        (looked_up + (F.linear(hidden[i].double(), table) * logits[i].double()).sum()).backward()
        grads.append(table.grad)
    return (ids, g, ROWS, padding, hidden, logits), torch.stack(grads)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize(("S", "T", "pull"), [(1, 1, 0.0), (5, 9, 0.0), (20, 20, -0.99), (20, 20, 1.0)])
def test_norm_is_a_close_upper_bound_and_the_sum_is_exact(
    backend: TorchBackend, padding: int | None, S: int, T: int, pull: float
) -> None:
    saved, grads = case(padding, S, T, pull)
    exact = grads.flatten(1).square().sum(1)
    found = backend.sqnorm("tied", saved).double()
    parts = sum(x.double().square().sum((1, 2)) for x in saved[1:2]).max()
    assert (found >= exact).all()
    assert (found - exact <= 2e-4 * (exact + 1e-3 * parts)).all()
    factors = torch.rand(B, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("b,bvd->vd", factors.double(), grads)
    torch.testing.assert_close(backend.clipped_grad("tied", saved, factors).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tied.per_sample(saved).double(), grads, rtol=1e-5, atol=1e-5)


def test_leaving_out_the_cross_term_would_be_seen(backend: TorchBackend) -> None:
    saved, grads = case(None, 20, 20, 1.0)
    parts = backend.sqnorm("embedding", saved[:4]) + backend.sqnorm("linear", saved[4:])
    assert (parts.double() < 0.6 * grads.flatten(1).square().sum(1)).all()
