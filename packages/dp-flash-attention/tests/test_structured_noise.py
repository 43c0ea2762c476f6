from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from dp_flash_attention.advanced_research_mechanisms import StructuredNoiseMechanism
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.registry import MECHANISMS

WIDTH, RANK, ROWS = 24, 4, 40
ALPHA = 1e-6


def noise(sensitivity: float = 1.0, shape: tuple[int, ...] = (ROWS, WIDTH)) -> Tensor:
    return StructuredNoiseMechanism().generate_low_rank_noise(shape, sensitivity, 1.0, 1e-6, RANK)


def test_noise_has_the_shape_lies_in_the_public_range_and_is_other_noise_each_time() -> None:
    basis = StructuredNoiseMechanism().low_rank_basis(WIDTH, RANK)
    torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-6, rtol=0)
    one, two = noise(shape=(2, 3, 5, WIDTH)), noise(shape=(2, 3, 5, WIDTH))
    assert one.shape == (2, 3, 5, WIDTH)
    assert not torch.isclose(one, two).any()
    torch.testing.assert_close(one @ basis @ basis.T, one, atol=1e-4, rtol=1e-4)
    assert not torch.equal(StructuredNoiseMechanism(seed=1).low_rank_basis(WIDTH, RANK), basis)


def test_in_the_range_it_is_gaussian_with_what_the_promise_needs() -> None:
    basis = StructuredNoiseMechanism().low_rank_basis(WIDTH, RANK)
    needed = 3.0 * MECHANISMS.create("gaussian").calibrate(1.0, 1e-6)
    values = (noise(3.0, (20_000, WIDTH)) @ basis).flatten().double().numpy()
    std = float((values**2).mean() ** 0.5)
    # a little more than the closed form: the sampler's end and the roundings are paid for, too
    assert 0.98 * needed < std < 1.05 * needed
    assert stats.kstest(values / std, "norm").pvalue > ALPHA


def ranks(release: Tensor, *candidates: Tensor) -> list[int]:
    """What an adversary sees who takes each candidate from the release."""
    return [int(torch.linalg.matrix_rank((release - f).double(), atol=1e-4)) for f in candidates]


def test_the_rank_of_the_rest_tells_neighbours_apart_for_fresh_factors_only() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, other = torch.randn(2, ROWS, WIDTH, generator=generator)
    factors = torch.randn(ROWS, RANK, generator=generator) @ torch.randn(RANK, WIDTH, generator=generator)
    assert ranks(truth + factors, truth, other) == [RANK, WIDTH]
    basis = StructuredNoiseMechanism().low_rank_basis(WIDTH, RANK)
    truth, other = (f @ basis @ basis.T for f in (truth, other))
    assert ranks(truth + noise(), truth, other) == [RANK, RANK]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((4, 3), 1.0, 1.0, 1e-6, 4), "rank must be at most the width, 3"),
        (((4, 0), 1.0, 1.0, 1e-6, 1), "tensor_shape must be"),
        (((), 1.0, 1.0, 1e-6, 1), "tensor_shape must be"),
        (((4, 8), 0.0, 1.0, 1e-6, 1), "sensitivity must be"),
        (((4, 8), 1.0, 0.0, 1e-6, 1), "epsilon must be"),
        (((4, 8), 1.0, float("inf"), 1e-6, 1), "epsilon must be"),
        (((4, 8), 1.0, 1.0, 0.0, 1), "needs delta > 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, text) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        StructuredNoiseMechanism().generate_low_rank_noise(*arguments)
