"""The law of the noise that is added, at fixed seeds, at the limits of ``noise_laws``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from noise_laws import KS_LIMIT, Z_LIMIT, chi_square, correlation, ks, laplace_cdf

from dpfa_kernels_torch.noise.release_noise import release_noise
from dpfa_kernels_torch.noise.training_noise import add_training_noise_

GENERATORS = ["chacha20", "philox4x32-10"]
NORMAL = torch.special.ndtr


@pytest.fixture
def shape(problem: Callable) -> object:
    return problem(batch=4, q_len=128, kv_len=128, q_heads=4, kv_heads=4, head_dim=96)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("transform", ["bm32", "bm64"])
def test_release_noise_is_gaussian(
    generator: str, transform: str, shape: object, plan: Callable, release_key: Callable
) -> None:
    noise = release_noise(shape, plan(transform=transform), release_key(generator)) / 0.25
    assert abs(chi_square(noise)) < Z_LIMIT
    assert ks(noise, NORMAL) < KS_LIMIT


@pytest.mark.parametrize("generator", GENERATORS)
def test_release_noise_is_laplace(generator: str, shape: object, plan: Callable, release_key: Callable) -> None:
    laplace = plan(distribution="laplace", head_scale=(0.5,))
    assert ks(release_noise(shape, laplace, release_key(generator)) / 0.5, laplace_cdf) < KS_LIMIT


def test_law_checks_see_a_std_two_percent_short(shape: object, plan: Callable, release_key: Callable) -> None:
    short = 0.98 * release_noise(shape, plan(head_scale=(1.0,)), release_key())
    assert abs(chi_square(short)) > Z_LIMIT
    assert ks(short, NORMAL) > KS_LIMIT


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("transform", ["bm32", "bm64"])
def test_noise_is_independent_along_every_coordinate(
    generator: str, transform: str, shape: object, plan: Callable, release_key: Callable
) -> None:
    unit = plan(transform=transform, head_scale=(1.0,))
    noise = release_noise(shape, unit, release_key(generator))
    for axis, lags in ((0, (1,)), (1, (1, 7, 8, 16)), (2, (1,)), (3, (1, 2, 8, 32))):
        for lag in lags:
            left = noise.narrow(axis, lag, noise.shape[axis] - lag)
            right = noise.narrow(axis, 0, noise.shape[axis] - lag)
            assert abs(correlation(left, right)) < Z_LIMIT, (axis, lag)
            assert abs(correlation(left.square() - 1, right.square() - 1)) < 2.5 * Z_LIMIT, (axis, lag)
    for other in (release_key(generator, release=1), release_key(generator, seed=12)):
        assert abs(correlation(noise, release_noise(shape, unit, other))) < Z_LIMIT


def test_each_head_and_row_has_its_scale(problem: Callable, plan: Callable, release_key: Callable) -> None:
    """scale(row i, head h) = head_scale[h] * row_scale[keys visible to i]."""
    shape = problem(causal=True, q_len=9)
    unit = release_noise(shape, plan(head_scale=(1.0,)), release_key(), torch.float64)
    heads = (1.0, 2.0, 3.0, 4.0)
    rows = tuple(0.5 + n for n in range(10))
    noise = release_noise(shape, plan(head_scale=heads, row_scale=rows), release_key(), torch.float64)
    visible = torch.arange(1, 10)
    expected = torch.tensor(rows, dtype=torch.float64)[visible].reshape(1, -1, 1, 1)
    expected = expected * torch.tensor(heads, dtype=torch.float64).reshape(1, 1, -1, 1)
    torch.testing.assert_close(noise, unit * expected, rtol=1e-15, atol=0)


def test_chunks_do_not_change_the_noise(
    monkeypatch: pytest.MonkeyPatch, shape: object, plan: Callable, release_key: Callable
) -> None:
    whole = release_noise(shape, plan(), release_key())
    monkeypatch.setattr("dpfa_kernels_torch.noise.release_noise.CHUNK", 96 * 11)
    assert torch.equal(release_noise(shape, plan(), release_key()), whole)


@pytest.mark.parametrize("generator", GENERATORS)
def test_training_noise_is_gaussian_and_independent(generator: str, training_key: Callable) -> None:
    key = training_key(generator)

    def noise(**at: int) -> torch.Tensor:
        where = {"parameter": 0, "step": 0, **at}
        return add_training_noise_(torch.zeros(200_001), 3.0, key, **where) / 3.0

    first = noise()
    assert abs(chi_square(first)) < Z_LIMIT
    assert ks(first, NORMAL) < KS_LIMIT
    for other in (noise(step=1), noise(parameter=1), noise(step=2**32), noise(first_element=200_001)):
        assert abs(correlation(first, other)) < Z_LIMIT
    for lag in (1, 2, 8):
        assert abs(correlation(first[lag:], first[:-lag])) < Z_LIMIT
