"""Gaussian noise on the summed gradient of one parameter."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpfa_core.checks import integer, non_negative, require
from dpfa_core.contracts import NoiseKey
from dpfa_kernels_torch.noise.draw import pairs
from dpfa_kernels_torch.noise.layout import CHACHA_TRAINING_BM64
from dpfa_kernels_torch.noise.training_run import add_run_

CHUNK = 1 << 17
"""Noise values computed at a time: the float64 working set stays in the cache."""


class Run(Protocol):
    """Adds the noise of consecutive elements on the CPU."""

    def __call__(
        self, flat: Tensor, std: float, secret: bytes, *, parameter: int, step: int, first_element: int
    ) -> None: ...


def add_training_noise_(
    grad: Tensor,
    std: float,
    key: NoiseKey,
    *,
    parameter: int,
    step: int,
    first_element: int = 0,
    run: Run | None = None,
) -> Tensor:
    """Add N(0, std^2) to every element of `grad`, in place, by the 53-bit profile.

    The noise of an element depends on (key, parameter, step, its index in the whole parameter) alone, so
    shards and ranks get their slices of the same noise.

    Guarantee: tested (shards equal slices; chi-square, KS, independence at fixed seeds).
    Args:
        grad: float32 or float64; elements count in row-major order.
        std: noise standard deviation in the gradient's units; 0 changes nothing.
        key: a key of purpose "training" on the gradient's device.
        parameter: the parameter's number, below 2**32.
        step: the optimiser step's number.
        first_element: index, in the whole parameter, of the first element of `grad`.
        run: what adds ChaCha20 noise on the CPU, to contiguous memory; by default this package's own.
    Returns: `grad`.
    Raises: PrivacyParameterError for another dtype, a negative or non-finite std, another purpose, or a
        coordinate past its bound.
    Source: PRIVACY P7 (noise before any rounding to a low precision) and P10.
    """
    require(
        grad.dtype in (torch.float32, torch.float64),
        "a gradient must be float32 or float64 when it gets its noise",
        str(grad.dtype),
        "Sum and noise in float32, round to the parameter's dtype afterwards.",
    )
    non_negative("the noise's std", std)
    require(key.purpose == "training", 'the noise key must have the purpose "training"', key.purpose)
    device = key.words.device
    require(grad.device == device, f"the gradient must be on the key's device, {device}", str(grad.device))
    for name, value in (("parameter", parameter), ("step", step), ("first_element", first_element)):
        integer(name, value, least=0)
    if std == 0:
        return grad
    flat = grad.detach().contiguous().view(-1)
    if key.generator == "chacha20" and device.type == "cpu":
        for (name, bound), value in zip(
            CHACHA_TRAINING_BM64.fields, (parameter, step, first_element + flat.numel() - 1), strict=True
        ):
            require(value < bound, f"the noise counter's {name} must be in [0, {bound})", value, "Use a new key.")
        secret = key.words.numpy().astype("<u4").tobytes()
        (run or add_run_)(flat, std, secret, parameter=parameter, step=step, first_element=first_element)
    else:
        _add_pairs_(flat, std, key, parameter, step, first_element)
    if flat.data_ptr() != grad.data_ptr():
        grad.detach().copy_(flat.view_as(grad))
    return grad


def _add_pairs_(flat: Tensor, std: float, key: NoiseKey, parameter: int, step: int, first_element: int) -> None:
    device = flat.device
    fixed = {
        "parameter": torch.tensor([parameter], device=device),
        "step": torch.tensor([step], device=device),
    }
    last = first_element + flat.numel()
    # Chunks begin at even elements: a pair is never split between two calls of the generator.
    for start in range(first_element - first_element % 2, last, CHUNK):
        stop = min(start + CHUNK, last)
        element = torch.arange(start, stop, 2, device=device)
        noise = pairs(key, "gaussian", "bm64", {**fixed, "element": element}, {}).flatten()
        begin = max(start, first_element)
        flat[begin - first_element : stop - first_element] += (noise[begin - start : stop - start] * std).to(flat.dtype)
