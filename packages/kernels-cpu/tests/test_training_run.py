"""The noise of the compiled library beside that of the torch backend, which is the truth."""

import ctypes

import numpy as np
import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_cpu import CpuBackend
from dpfa_kernels_cpu.library import LEVELS, best_level, library
from dpfa_kernels_cpu.training_run import OF_BLOCK, SMALL, add_run_
from dpfa_kernels_torch import KeySource, TorchBackend
from dpfa_kernels_torch.noise.keystream import keystream
from dpfa_kernels_torch.noise.training_run import add_run_ as truth_

SECRET = bytes(range(32))


def noise(n: int, dtype: torch.dtype, run, **options) -> torch.Tensor:
    out = torch.zeros(n, dtype=dtype)
    place = {"parameter": 7, "step": (3 << 32) + 5, "first_element": 0} | options
    run(out, 1.7, SECRET, **place)
    return out


def levels() -> list[int]:
    return list(range(best_level() + 1))


@pytest.mark.parametrize("level", levels(), ids=lambda level: LEVELS[level])
@pytest.mark.parametrize(("n", "first"), [(1, 0), (1, 7), (5, 3), (128, 0), (131, 5), (4099, 2**20 + 1), (9, 2**34)])
def test_noise_is_that_of_torch(level, n, first):
    found = noise(n, torch.float32, add_run_, first_element=first, level=level)
    assert torch.equal(found, noise(n, torch.float32, truth_, first_element=first))
    exact = noise(n, torch.float64, add_run_, first_element=first, level=level)
    torch.testing.assert_close(exact, noise(n, torch.float64, truth_, first_element=first), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("level", levels(), ids=lambda level: LEVELS[level])
def test_a_million_elements_are_those_of_torch(level):
    found, truth = (noise(1 << 20, torch.float32, run, **options) for run, options in _both(level))
    different = (found != truth).sum()
    assert different <= 8  # where float64 values on either side of a float32 boundary differ in their last bit
    torch.testing.assert_close(found, truth, rtol=2.0**-23, atol=0)


def _both(level):
    return (add_run_, {"level": level}), (truth_, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype):
    first, *others = (noise(50_003, dtype, add_run_, level=level) for level in levels())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_slices_add_the_same_noise(dtype):
    n = 4 * SMALL + 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = noise(n, dtype, add_run_)
        torch.set_num_threads(3)
        assert torch.equal(noise(n, dtype, add_run_), whole)
    finally:
        torch.set_num_threads(before)
    for first in (1, OF_BLOCK, 3 * SMALL + 5):
        assert torch.equal(noise(n - first, dtype, add_run_, first_element=first), whole[first:])


def test_noise_is_added_to_what_is_there_and_nothing_else():
    around = torch.full((300,), 5.0)
    add_run_(around[100:200], 2.0, SECRET, parameter=1, step=2, first_element=11)
    expected = torch.full((100,), 5.0)
    truth_(expected, 2.0, SECRET, parameter=1, step=2, first_element=11)
    assert torch.equal(around[100:200], expected)
    assert (around[:100] == 5.0).all()
    assert (around[200:] == 5.0).all()


def test_extreme_words_give_finite_noise_as_torch_does():
    """The ends of the 53-bit range: a radius is never zero and ends at 8.65; seen through the values of many blocks."""
    words = keystream(SECRET, 0, 1 << 16, (7, 5, 3)).numpy().astype("<u4").reshape(-1, 4)
    bits = (words[:, 1].astype(np.uint64) << np.uint64(21)) | (words[:, 0] >> np.uint32(11)).astype(np.uint64)
    found = noise(8 << 16, torch.float64, add_run_).view(-1, 2).double() / 1.7
    radius = found.square().sum(1)
    smallest, largest = int(np.argmax(bits)), int(np.argmin(bits))
    for index in (smallest, largest):
        u = (float(bits[index]) + 0.5) / 2.0**53
        log = np.log(u) if u < 0.5 else np.log1p(-(2.0**53 - 1 - float(bits[index]) + 0.5) / 2.0**53)
        assert float(radius[index]) == pytest.approx(-2 * log, rel=1e-12)
    assert radius.min() > 0


def test_a_level_that_was_not_built_is_told():
    out = torch.zeros(8)
    stream = (ctypes.c_uint32 * 3)(0, 0, 0)
    arguments = (out.data_ptr(), 0, 8, 1.0, SECRET, 0, stream)
    assert library().dpfa_add_noise_f32(3, *arguments) == 1
    assert library().dpfa_add_noise_f32(-1, *arguments) == 1
    assert (out == 0).all()


def test_the_backend_adds_what_torch_adds_and_refuses_what_it_refuses():
    key = KeySource(seed=3).key("training")
    for shape in ((5,), (33, 7), (0,)):
        grads = [torch.ones(shape) for _ in range(2)]
        for backend, grad in zip((CpuBackend(), TorchBackend()), grads, strict=True):
            assert backend.add_noise_(grad, 0.5, key, parameter=2, step=9) is grad
        assert torch.equal(*grads)
    strided = torch.zeros(6, 4).T
    CpuBackend().add_noise_(strided, 1.0, key, parameter=0, step=0)
    straight = torch.zeros(4, 6)
    TorchBackend().add_noise_(straight, 1.0, key, parameter=0, step=0)
    assert torch.equal(strided, straight)
    with pytest.raises(PrivacyParameterError, match="must be float32 or float64"):
        CpuBackend().add_noise_(torch.zeros(3, dtype=torch.bfloat16), 1.0, key, parameter=0, step=0)


def test_philox_noise_is_torchs_own():
    key = KeySource(seed=3, generator="philox4x32-10").key("training")
    grads = [torch.zeros(33) for _ in range(2)]
    for backend, grad in zip((CpuBackend(), TorchBackend()), grads, strict=True):
        backend.add_noise_(grad, 0.5, key, parameter=2, step=9)
    assert torch.equal(*grads)
