"""Squared norms of the compiled library: never below the exact ones, and close to them."""

from fractions import Fraction

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_cpu import CpuBackend, backend
from dpfa_kernels_cpu.library import LEVELS, best_level, function
from dpfa_kernels_cpu.norms import SMALL, bare_squares, embedding_squares
from dpfa_kernels_torch import TorchBackend

LEVEL = pytest.mark.parametrize("level", range(best_level() + 1), ids=lambda level: LEVELS[level])
TIGHT = 1 + 1e-12


def gradients(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-6, 3, generator=generator)


def exact(row: torch.Tensor) -> Fraction:
    return sum((Fraction(x) ** 2 for x in row.flatten().tolist()), Fraction(0))


@LEVEL
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 16), (4, 17), (2, 3, 5, 7), (3, 1021), (1, 4096)])
def test_bare_squares_are_just_above_the_exact_sums(level, shape):
    g = gradients(*shape)
    for found, row in zip(bare_squares(g, level=level).tolist(), g, strict=True):
        assert exact(row) <= Fraction(found) <= exact(row) * Fraction(TIGHT)


@LEVEL
@pytest.mark.parametrize("padding", [None, 0, 5])
@pytest.mark.parametrize(("B", "T", "d", "rows"), [(1, 1, 1, 9), (3, 12, 5, 6), (2, 33, 48, 6), (4, 9, 17, 10**9)])
def test_embedding_squares_are_just_above_the_exact_norms(level, B, T, d, rows, padding):
    g = gradients(B, T, d)
    ids = torch.randint(0, min(rows, 6), (B, T), generator=torch.Generator().manual_seed(1))
    found = embedding_squares(ids, g, rows, padding, level=level)
    for sample in range(B):
        sums = {}
        for row, token in zip(g[sample].tolist(), ids[sample].tolist(), strict=True):
            if token != padding:
                before = sums.get(token, [Fraction(0)] * d)
                sums[token] = [x + Fraction(y) for x, y in zip(before, row, strict=True)]
        true = sum((x**2 for row in sums.values() for x in row), Fraction(0))
        assert true <= Fraction(float(found[sample])) <= true * Fraction(1 + 4e-9) + Fraction(1e-20)


@LEVEL
def test_terms_that_cancel_are_bounded_from_above(level):
    """What is left of 1e8 - 1e8 must not be measured by the rounding of its terms."""
    g = torch.tensor([[1e8, 1.0], [-1e8, 1e-9], [3e-3, 0.0], [1e8, 0.0], [-1e8, 0.0]]).unsqueeze(0)
    ids = torch.zeros(1, 5, dtype=torch.long)
    column, other = (sum(map(Fraction, g[0, :, i].tolist()), Fraction(0)) for i in (0, 1))
    found = Fraction(float(embedding_squares(ids, g, 4, None, level=level)))
    assert column**2 + other**2 <= found <= (column**2 + other**2) * Fraction(1 + 1e-5)


def test_every_instruction_set_gives_the_same_bits():
    g, ids = gradients(3, 40, 37), torch.randint(0, 9, (3, 40), generator=torch.Generator().manual_seed(4))
    for results in (
        [bare_squares(g, level=level) for level in range(best_level() + 1)],
        [embedding_squares(ids, g, 9, 2, level=level) for level in range(best_level() + 1)],
    ):
        assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_threads_sum_the_same_squares(samples):
    g, before = gradients(samples, SMALL), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bare_squares(g)
        torch.set_num_threads(3)
        assert torch.equal(bare_squares(g), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_infinite_in_its_own_sample_only(value):
    g, ids = gradients(3, 4, 5), torch.zeros(3, 4, dtype=torch.int32)
    g[1, 2, 3] = value
    for kind, saved in (("bare", (g,)), ("embedding", (ids, g, 7, None))):
        found = CpuBackend().sqnorm(kind, saved)
        assert found.dtype == torch.float32
        assert found[1] == torch.inf
        assert torch.isfinite(found[[0, 2]]).all()
    ids[1, 2] = 6
    assert torch.isfinite(CpuBackend().sqnorm("embedding", (ids, g, 7, 6))).all()


@pytest.mark.parametrize("saved", [(torch.zeros(0, 3),), (torch.zeros(2, 0),), (torch.ones(4),)], ids=str)
def test_empty_and_flat_gradients(saved):
    pair = [one.sqnorm("bare", saved) for one in (CpuBackend(), TorchBackend())]
    torch.testing.assert_close(*pair, rtol=2e-5, atol=0)


def test_the_backend_agrees_with_torch_and_checks_as_it_does(monkeypatch):
    g, ids = torch.randn(3, 8, 6), torch.randint(0, 5, (3, 8))
    native = []
    for name in ("bare_squares", "embedding_squares"):
        inner = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, inner=inner, name=name: (native.append(name), inner(*a))[1])
    embedding = (ids, g, 5, None)
    for kind, saved in (("bare", (g,)), ("embedding", embedding)):
        pair = [one.sqnorm(kind, saved) for one in (CpuBackend(), TorchBackend())]
        torch.testing.assert_close(*pair, rtol=2e-5, atol=0)
    assert native == ["bare_squares", "embedding_squares"]
    # other numbers, and what does not lie side by side, are torch's
    for kind, saved in (
        ("bare", (g.double(),)),
        ("bare", (g.bfloat16(),)),
        ("bare", (g.mT,)),
        ("embedding", (ids, g.bfloat16(), 5, None)),
        ("scale", (g, g)),
    ):
        assert torch.equal(CpuBackend().sqnorm(kind, saved), TorchBackend().sqnorm(kind, saved))
    assert len(native) == 2
    with pytest.raises(PrivacyParameterError, match=r"token ids must be in \[0, 5\)"):
        CpuBackend().sqnorm("embedding", (ids + 5, g, 5, None))
    with pytest.raises(PrivacyParameterError, match="method"):
        CpuBackend().sqnorm("bare", (g,), method="gram")


def test_a_level_that_was_not_built_is_told():
    g, out = torch.ones(1, 4), torch.zeros(1, dtype=torch.float64)
    assert function("dpfa_bare_squares")(3, g.data_ptr(), 1, 4, out.data_ptr()) == 1
    assert out == 0
