"""The epilogue: the same bits by itself and inside a release."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import NoisePlan
from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.noise.release_noise import release_noise

SCALE = 0.4


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_privatize_equals_release_with_output_clip(
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    plan: Callable,
    noiseless: NoisePlan,
    release_key: Callable,
    distribution: str,
    norm: str,
    dtype: str,
) -> None:
    shape = problem(dtype=dtype, clip="output", clip_norm=0.4, causal=True)
    unclipped = problem(dtype=dtype, causal=True)
    tensors = inputs(shape)
    noisy = plan(distribution=distribution, norm=norm)
    whole, _ = backend.release(*tensors, shape, noisy, None, release_key(), softmax_scale=SCALE)
    x, _ = backend.release(*tensors, unclipped, noiseless, None, None, softmax_scale=SCALE)
    assert backend.privatize_(x, shape, noisy, None, release_key(), clip_rows=True) is x
    assert torch.equal(x, whole)


@pytest.mark.parametrize("generator", ["chacha20", "philox4x32-10"])
def test_privatize_equals_release_with_value_clip(
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    plan: Callable,
    noiseless: NoisePlan,
    release_key: Callable,
    generator: str,
) -> None:
    shape = problem(clip_norm=0.4, logit_bound=1.0)
    tensors = inputs(shape)
    key = release_key(generator, release=5)
    whole, _ = backend.release(*tensors, shape, plan(), None, key, softmax_scale=SCALE)
    x, _ = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    assert torch.equal(backend.privatize_(x, shape, plan(), None, key, clip_rows=False), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_noise_is_added_in_float32_and_the_sum_rounded_once(
    backend: TorchBackend, problem: Callable, plan: Callable, release_key: Callable, dtype: str
) -> None:
    shape = problem(dtype=dtype, clip_norm=1.0)
    x = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(4)).to(getattr(torch, dtype))
    noise = release_noise(shape, plan(transform="bm32"), release_key())
    expected = (x.float() + noise).to(x.dtype)
    assert torch.equal(
        backend.privatize_(x, shape, plan(transform="bm32"), None, release_key(), clip_rows=False), expected
    )


def test_release_rounds_once(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, release_key: Callable
) -> None:
    """Rounding attention before the noise gives other values for some outputs."""
    fine, coarse = problem(clip_norm=1.0), problem(clip_norm=1.0, dtype="bfloat16")
    tensors = inputs(coarse)
    wide, _ = backend.release(
        *(x.float() for x in tensors),
        fine,
        plan(),
        None,
        release_key(),
        softmax_scale=SCALE,
    )
    out, _ = backend.release(*tensors, coarse, plan(), None, release_key(), softmax_scale=SCALE)
    assert torch.equal(out, wide.bfloat16())


def test_one_key_gives_the_same_bits_and_another_release_others(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, release_key: Callable
) -> None:
    shape = problem(clip_norm=1.0)
    tensors = inputs(shape)
    outs = [
        backend.release(*tensors, shape, plan(), None, key, softmax_scale=SCALE)[0]
        for key in (release_key(), release_key(), release_key(release=1))
    ]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] != outs[2]).all()


def test_rows_that_see_no_key_get_noise_too(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, release_key: Callable
) -> None:
    shape = problem(clip_norm=1.0, lengths=((7, 9), (2, 0)))
    out, _ = backend.release(*inputs(shape), shape, plan(), None, release_key(), softmax_scale=SCALE)
    assert torch.equal(out[1], release_noise(shape, plan(), release_key())[1])


def test_non_finite_row_becomes_noise_alone(
    backend: TorchBackend, problem: Callable, plan: Callable, release_key: Callable
) -> None:
    shape = problem(clip_norm=1.0)
    noise = release_noise(shape, plan(), release_key())
    for clip in (True, False):
        x = torch.randn(2, 7, 4, 5)
        x[1, 2, 3, 0] = float("nan")
        out = backend.privatize_(x, shape, plan(), None, release_key(), clip_rows=clip)
        assert torch.equal(out[1, 2, 3], noise[1, 2, 3])


def test_clipping_without_a_bound_is_refused(backend: TorchBackend, problem: Callable, noiseless: NoisePlan) -> None:
    with pytest.raises(PrivacyParameterError, match="clip_rows needs a problem with a clip_norm"):
        backend.privatize_(torch.zeros(2, 7, 4, 5), problem(), noiseless, None, None, clip_rows=True)
