"""add_noise_: a function of the element's place in the whole parameter, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch import KeySource, TorchBackend
from dpfa_kernels_torch.noise.draw import pairs
from dpfa_kernels_torch.noise.training_noise import add_training_noise_

AT = {"parameter": 3, "step": 5}


@pytest.mark.parametrize("generator", ["chacha20", "philox4x32-10"])
@pytest.mark.parametrize("cuts", [(0, 1, 1000), (0, 7, 8, 501, 1000), (0, 333, 1000)])
def test_shards_get_slices_of_the_same_noise(
    backend: TorchBackend, training_key: Callable, generator: str, cuts: tuple[int, ...]
) -> None:
    key = training_key(generator)
    whole = backend.add_noise_(torch.zeros(1000), 2.0, key, **AT)
    for start, stop in pairwise(cuts):
        shard = backend.add_noise_(torch.zeros(stop - start), 2.0, key, **AT, first_element=start)
        assert torch.equal(shard, whole[start:stop])


@pytest.mark.parametrize("generator", ["chacha20", "philox4x32-10"])
def test_pieces_do_not_change_the_noise(
    monkeypatch: pytest.MonkeyPatch, backend: TorchBackend, training_key: Callable, generator: str
) -> None:
    whole = backend.add_noise_(torch.zeros(1001), 2.0, training_key(generator), **AT, first_element=3)
    monkeypatch.setattr("dpfa_kernels_torch.noise.training_noise.CHUNK", 64)
    monkeypatch.setattr("dpfa_kernels_torch.noise.training_run.PIECE", 64)
    again = backend.add_noise_(torch.zeros(1001), 2.0, training_key(generator), **AT, first_element=3)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0, 5, 2**32 + 9, 2**62])
def test_the_fast_run_equals_the_counter_map(
    monkeypatch: pytest.MonkeyPatch, training_key: Callable, step: int, dtype: torch.dtype
) -> None:
    key, piece = training_key("chacha20"), 4096
    monkeypatch.setattr("dpfa_kernels_torch.noise.training_run.PIECE", piece)
    first, count = piece - 5, 2 * piece + 9  # odd ends in four pieces
    fast = torch.zeros(count, dtype=dtype)
    add_training_noise_(fast, 1.5, key, parameter=7, step=step, first_element=first)
    element = torch.arange(first - first % 2, first + count + 1, 2)
    fixed = {"parameter": torch.tensor([7]), "step": torch.tensor([step])}
    truth = 1.5 * pairs(key, "gaussian", "bm64", fixed | {"element": element}, {}).flatten()
    torch.testing.assert_close(
        fast, truth[first % 2 :][:count].to(dtype), rtol=3e-7 if dtype == torch.float32 else 1e-14, atol=0
    )


def test_layout_in_memory_does_not_matter(backend: TorchBackend, training_key: Callable) -> None:
    key = training_key()
    plain = backend.add_noise_(torch.zeros(6, 10), 1.0, key, **AT)
    transposed = torch.zeros(10, 6).T
    assert backend.add_noise_(transposed, 1.0, key, **AT) is transposed
    assert torch.equal(transposed, plain)


def test_float64_noise_rounds_to_the_float32_noise(backend: TorchBackend, training_key: Callable) -> None:
    wide = backend.add_noise_(torch.zeros(100, dtype=torch.float64), 0.3, training_key(), **AT)
    assert torch.equal(wide.float(), backend.add_noise_(torch.zeros(100), 0.3, training_key(), **AT))


def test_std_zero_changes_nothing(backend: TorchBackend, training_key: Callable) -> None:
    grad = torch.randn(10)
    before = grad.clone()
    assert torch.equal(backend.add_noise_(grad, 0.0, training_key(), **AT), before)


def test_empty_gradient_is_left_alone(backend: TorchBackend, training_key: Callable) -> None:
    assert backend.add_noise_(torch.zeros(0), 1.0, training_key(), **AT).numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradient_is_refused(backend: TorchBackend, training_key: Callable, dtype: torch.dtype) -> None:
    with pytest.raises(PrivacyParameterError, match=r"must be float32 or float64.*round to the parameter's"):
        backend.add_noise_(torch.zeros(4, dtype=dtype), 1.0, training_key(), **AT)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_bad_std_is_refused(backend: TorchBackend, training_key: Callable, std: float) -> None:
    with pytest.raises(PrivacyParameterError, match="the noise's std must be a finite number >= 0"):
        backend.add_noise_(torch.zeros(4), std, training_key(), **AT)


@pytest.mark.parametrize("purpose", ["release", "sampling"])
def test_key_of_another_purpose_is_refused(backend: TorchBackend, purpose: str) -> None:
    with pytest.raises(PrivacyParameterError, match='must have the purpose "training"'):
        backend.add_noise_(torch.zeros(4), 1.0, KeySource().key(purpose), **AT)


def test_key_on_another_device_is_refused(backend: TorchBackend, training_key: Callable) -> None:
    with pytest.raises(PrivacyParameterError, match="must be on the key's device, cpu"):
        backend.add_noise_(torch.zeros(4, device="meta"), 1.0, training_key(), **AT)


@pytest.mark.parametrize("at", [{"parameter": 2**32, "step": 0}, {"parameter": 0, "step": -1}])
def test_coordinate_out_of_range_is_refused(backend: TorchBackend, training_key: Callable, at: dict[str, int]) -> None:
    with pytest.raises(PrivacyParameterError, match="must be"):
        backend.add_noise_(torch.zeros(4), 1.0, training_key(), **at)


def test_last_counter_is_used_and_the_next_one_refused(backend: TorchBackend, training_key: Callable) -> None:
    last = 2**35 - 4
    backend.add_noise_(torch.zeros(4), 1.0, training_key(), **AT, first_element=last)
    with pytest.raises(PrivacyParameterError, match="element must be in"):
        backend.add_noise_(torch.zeros(5), 1.0, training_key(), **AT, first_element=last)
