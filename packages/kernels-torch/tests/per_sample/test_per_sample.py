"""Norms and clipped sums against exact per-sample gradients in float64, kind by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.per_sample import RULES, linear, rule

B = 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_case(T: int, d: int, p: int) -> tuple[tuple[Any, ...], torch.Tensor]:
    """(saved, exact gradients [B, p, d] by autograd, one sample at a time)."""
    a, g = draw(B, T, d), draw(B, T, p, seed=1)
    grads = []
    for i in range(B):
        weight = torch.zeros(p, d, dtype=torch.float64, requires_grad=True)
        (torch.nn.functional.linear(a[i].double(), weight) * g[i].double()).sum().backward()
        grads.append(weight.grad)
    return (a, g), torch.stack(grads)


def embedding_case(padding: int | None) -> tuple[tuple[Any, ...], torch.Tensor]:
    rows, T, d = 7, 20, 6
    ids = torch.randint(0, rows, (B, T), generator=torch.Generator().manual_seed(2))
    g, grads = draw(B, T, d), []
    for i in range(B):
        table = torch.zeros(rows, d, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.embedding(ids[i], table, padding_idx=padding)
        (out * g[i].double()).sum().backward()
        grads.append(table.grad)
    return (ids, g, rows, padding), torch.stack(grads)


def norm_layer_case(kind: str) -> tuple[tuple[Any, ...], torch.Tensor]:
    x, g, grads = draw(B, 9, 6), draw(B, 9, 6, seed=1), []
    normalised = torch.nn.functional.layer_norm(x.double(), (6,))
    for i in range(B):
        scale = torch.ones(6, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        out = torch.nn.functional.layer_norm(x[i].double(), (6,), scale, shift)
        (out * g[i].double()).sum().backward()
        grads.append(scale.grad if kind == "scale" else shift.grad)
    saved = (normalised.float(), g) if kind == "scale" else (g,)
    return saved, torch.stack(grads)


def bare_case() -> tuple[tuple[Any, ...], torch.Tensor]:
    g = draw(B, 3, 4)
    return (g,), g.double()


CASES: dict[str, tuple[str, tuple[Any, ...], torch.Tensor]] = {
    "linear, one position": ("linear", *linear_case(1, 8, 5)),
    "linear, gram is cheaper": ("linear", *linear_case(5, 40, 30)),
    "linear, direct is cheaper": ("linear", *linear_case(70, 6, 5)),
    "linear, several tiles": ("linear", *linear_case(300, 9, 7)),
    "linear, one feature": ("linear", *linear_case(4, 1, 1)),
    "embedding": ("embedding", *embedding_case(None)),
    "embedding with padding": ("embedding", *embedding_case(3)),
    "scale": ("scale", *norm_layer_case("scale")),
    "shift": ("shift", *norm_layer_case("shift")),
    "bare": ("bare", *bare_case()),
}


def squares(grads: torch.Tensor) -> torch.Tensor:
    return grads.flatten(1).square().sum(1)


def methods(kind: str) -> list[str]:
    return ["auto", *RULES[kind].methods]


def cast(saved: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in saved)


@pytest.mark.parametrize("case", CASES)
def test_norms_are_upper_bounds_close_to_the_exact_norms(backend: TorchBackend, case: str) -> None:
    kind, saved, grads = CASES[case]
    exact = squares(grads)
    for method in methods(kind):
        found = backend.sqnorm(kind, saved, method=method)
        assert found.dtype == torch.float32
        assert found.shape == (B,)
        # float32 holds the normalised input that the exact gradient has in float64
        slack = 1e-5 if kind == "scale" else 0.0
        assert (found.double() >= exact * (1 - slack)).all()
        torch.testing.assert_close(found.double().sqrt(), exact.sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_clipped_gradient_is_the_weighted_sum(backend: TorchBackend, case: str) -> None:
    kind, saved, grads = CASES[case]
    factors = torch.rand(B, generator=torch.Generator().manual_seed(3))
    found = backend.clipped_grad(kind, saved, factors)
    assert found.dtype == torch.float32
    expected = torch.einsum("b,b...->...", factors.double(), grads)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    total = torch.ones_like(found)
    assert backend.add_clipped_grad_(total, kind, saved, factors) is total
    torch.testing.assert_close(total, found + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_double_inputs_stay_double(backend: TorchBackend, case: str) -> None:
    kind, saved, grads = CASES[case]
    found = backend.clipped_grad(kind, cast(saved, torch.float64), torch.ones(B))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, grads.sum(0), rtol=0, atol=1e-5 if kind == "scale" else 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_change_the_results(monkeypatch: pytest.MonkeyPatch, backend: TorchBackend, case: str) -> None:
    kind, saved, _ = CASES[case]
    before = [backend.sqnorm(kind, saved, method=m) for m in methods(kind)]
    grad = backend.clipped_grad(kind, saved, torch.ones(B))
    for module in (rule, linear):
        monkeypatch.setattr(module, "WORKING_SET", 10)
    monkeypatch.setattr(linear, "TILE", 3)
    for method, expected in zip(methods(kind), before, strict=True):
        torch.testing.assert_close(backend.sqnorm(kind, saved, method=method), expected, rtol=1e-6, atol=0)
    # terms of both signs: what float32 sums lose depends on their order
    torch.testing.assert_close(backend.clipped_grad(kind, saved, torch.ones(B)), grad, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_gives_zero_gradients(backend: TorchBackend, case: str) -> None:
    kind, saved, grads = CASES[case]
    empty = tuple(x[:0] if isinstance(x, torch.Tensor) else x for x in saved)
    assert backend.sqnorm(kind, empty).shape == (0,)
    found = backend.clipped_grad(kind, empty, torch.ones(0))
    assert torch.equal(found, torch.zeros_like(grads[0], dtype=torch.float32))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_sample_has_an_infinite_norm_and_is_removed_by_factor_zero(
    backend: TorchBackend, case: str, bad: float
) -> None:
    kind, saved, _ = CASES[case]
    position = 1 if kind == "embedding" else 0
    spoiled = list(cast(saved, torch.float32))
    spoiled[position] = spoiled[position].clone()
    # the first token that is not padding
    token = int((saved[0][2] != 3).nonzero()[0]) if kind == "embedding" else 0
    spoiled[position][2, token] = bad
    for method in methods(kind):
        norms = backend.sqnorm(kind, tuple(spoiled), method=method)
        assert torch.isinf(norms[2])
        torch.testing.assert_close(norms[[0, 1, 3, 4]], backend.sqnorm(kind, saved)[[0, 1, 3, 4]])
    factors = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    found = backend.clipped_grad(kind, tuple(spoiled), factors)
    torch.testing.assert_close(found, backend.clipped_grad(kind, saved, factors))


@pytest.mark.parametrize("case", CASES)
def test_low_precision_inputs_are_summed_in_high_precision(backend: TorchBackend, case: str) -> None:
    """Equal to the same rounded inputs given in float64."""
    kind, saved, _ = CASES[case]
    low = cast(saved, torch.bfloat16)
    same = cast(low, torch.float64)
    for method in methods(kind):
        found = backend.sqnorm(kind, low, method=method)
        torch.testing.assert_close(found, backend.sqnorm(kind, same), rtol=1e-6, atol=0)
    factors = torch.rand(B, generator=torch.Generator().manual_seed(4))
    expected = backend.clipped_grad(kind, same, factors)
    found = backend.clipped_grad(kind, low, factors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_global_settings_do_not_lower_the_precision(backend: TorchBackend) -> None:
    saved, grads = linear_case(64, 32, 16)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backend.clipped_grad("linear", saved, torch.ones(B))
            norms = backend.sqnorm("linear", saved)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found.double(), grads.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms.double(), squares(grads), rtol=1e-6, atol=0)


def cancelling(spread: float, n: int = 16, T: int = 64, d: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that share one large input, and output gradients that nearly sum to zero."""
    generator = torch.Generator().manual_seed(7)
    a = 30.0 + spread * torch.randn(n, T, d, generator=generator)
    half = torch.randn(n, T // 2, d, generator=generator)
    return a, torch.cat([half, -half], 1)


def test_fault_gram_cancellation_in_float32_leaves_samples_unclipped(backend: TorchBackend) -> None:
    """The plain float32 Gram form is below the truth, even negative, on this input; the bound is not."""
    a, g = cancelling(1e-3)
    exact = torch.bmm(g.double().mT, a.double()).square().sum((1, 2))
    naive = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    assert (naive < 0).any()
    for method in ("auto", "direct", "gram"):
        found = backend.sqnorm("linear", (a, g), method=method).double()
        assert (found >= exact).all()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_fault_gram_gives_way_to_direct_where_its_slack_is_large(backend: TorchBackend) -> None:
    """An exact cancellation: what is left of the Gram form is rounding, of the direct form zero."""
    a, g = cancelling(0.0)
    a[:] = a[:, :1] * 2.0**40
    found = backend.sqnorm("linear", (a, g), method="gram")
    direct = backend.sqnorm("linear", (a, g), method="direct")
    assert torch.equal(found, direct)
    assert (found > 0).all()


def test_fault_bfloat16_gram_collapses(backend: TorchBackend) -> None:
    """A Gram form summed in bfloat16 misses the norm of these bfloat16 inputs; the bound does not."""
    a, g = (x.bfloat16() for x in cancelling(0.2))
    exact = torch.bmm(g.double().mT, a.double()).square().sum((1, 2))
    naive = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    assert (naive < 0).any()
    for method in ("direct", "gram"):
        found = backend.sqnorm("linear", (a, g), method=method).double()
        assert (found >= exact).all()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


def test_fault_factor_folded_into_bfloat16_exceeds_the_bound(backend: TorchBackend) -> None:
    """One clipped sample stays within the bound; with its factor rounded to bfloat16 it would not."""
    a, g = (x.bfloat16() for x in (draw(1, 16, 24), draw(1, 16, 12, seed=1)))
    norm = backend.sqnorm("linear", (a, g)).sqrt()
    factors = 1.0 / norm
    found = backend.clipped_grad("linear", (a, g), factors)
    assert found.double().norm() <= 1 + 2**-20
    scales = (torch.arange(1, 200) / 200).bfloat16()
    folded = [
        float(((g * c).double().mT @ a.double())[0].norm() / (float(norm) * i / 200)) for i, c in enumerate(scales, 1)
    ]
    assert max(folded) > 1 + 2**-10


def test_clipped_norm_never_exceeds_the_bound(backend: TorchBackend) -> None:
    """factor = C / sqrt(sqnorm) for each sample alone, in every kind."""
    for kind, saved, _ in CASES.values():
        norms = backend.sqnorm(kind, saved).sqrt()
        for i in range(B):
            factors = torch.zeros(B)
            factors[i] = 1.0 / norms[i]
            assert backend.clipped_grad(kind, saved, factors).double().norm() <= 1 + 2**-20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_sample_gradients_are_those_of_autograd(backend: TorchBackend, dtype: torch.dtype) -> None:
    saved, _ = linear_case(9, 8, 5)
    saved = cast(saved, dtype)
    exact = torch.bmm(saved[1].double().mT, saved[0].double())
    found = backend.per_sample_grad("linear", saved)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(PrivacyParameterError, match="offers the kinds 'linear' and 'tied', got 'shift'"):
        backend.per_sample_grad("shift", CASES["shift"][1])


@pytest.mark.parametrize("shape", [(1,), (7,), (4099,), (384, 1536), (3, 1031), (2, 2, 2, 640)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_norm_of_a_formed_gradient_is_never_below(backend: TorchBackend, shape: tuple[int, ...], scale: float) -> None:
    gradient = draw(3, *shape) * scale
    exact = gradient.double().flatten(1).square().sum(1)
    found = backend.sqnorm("bare", (gradient,)).double()
    assert (found >= exact).all()
    torch.testing.assert_close(found, exact, rtol=9e-6, atol=1e-30)


def test_gram_is_chosen_when_it_multiplies_less() -> None:
    assert linear.gram_is_cheaper(1, 4096, 4096)
    assert linear.gram_is_cheaper(512, 4096, 4096)
    assert not linear.gram_is_cheaper(8192, 4096, 4096)
    assert not linear.gram_is_cheaper(197, 64, 64)


def test_embedding_uses_no_table_per_sample(backend: TorchBackend) -> None:
    """A table far larger than memory for each sample would allow."""
    ids = torch.tensor([[0, 10**9, 0], [5, 5, 5]])
    g = draw(2, 3, 4)
    expected = torch.stack([(g[0, 0] + g[0, 2]).square().sum() + g[0, 1].square().sum(), g[1].sum(0).square().sum()])
    torch.testing.assert_close(backend.sqnorm("embedding", (ids, g, 2 * 10**9, None)), expected)


REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "four dimensions": ("linear", (draw(2, 3, 3, 4), draw(2, 3, 3, 4)), "must have 3 dimensions"),
    "positions differ": ("linear", (draw(2, 3, 4), draw(2, 4, 4)), "must agree in samples and positions"),
    "shift without positions": ("shift", (draw(2, 3),), "must have 3 dimensions"),
    "scale shapes": ("scale", (draw(2, 3, 4), draw(2, 3, 5)), "must have the output gradient's shape"),
    "token": ("embedding", (torch.tensor([[7]]), draw(1, 1, 2), 7, None), r"token ids must be in \[0, 7\)"),
    "ids": ("embedding", (torch.tensor([[1, 2]]), draw(1, 1, 2), 7, None), "must agree in samples"),
    "kind": ("tied_cross", (draw(2, 3, 4),), "kind must be one of 'linear', 'embedding', 'scale', 'shift'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(backend: TorchBackend, case: str) -> None:
    kind, saved, text = REFUSED[case]
    with pytest.raises(PrivacyParameterError, match=text):
        backend.sqnorm(kind, saved)
    with pytest.raises(PrivacyParameterError, match=text):
        backend.clipped_grad(kind, saved, torch.ones(len(saved[0])))


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        (torch.ones(4), r"factors must have the shape \(5,\)"),
        (torch.tensor([1.0, float("nan"), 1, 1, 1]), "finite and >= 0"),
        (torch.tensor([1.0, -1.0, 1, 1, 1]), "finite and >= 0"),
        (torch.tensor([1.0, float("inf"), 1, 1, 1]), "finite and >= 0"),
    ],
)
def test_bad_factors_are_refused(backend: TorchBackend, factors: torch.Tensor, text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        backend.clipped_grad("bare", CASES["bare"][1], factors)


def test_unknown_method_is_refused(backend: TorchBackend) -> None:
    with pytest.raises(PrivacyParameterError, match="method of 'shift' must be one of 'auto', 'direct'"):
        backend.sqnorm("shift", CASES["shift"][1], method="gram")
