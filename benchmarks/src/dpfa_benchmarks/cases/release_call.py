"""One private attention call against plain attention and against the pipeline that people write by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_benchmarks.case import Contender, Step

Inputs = tuple[Tensor, Tensor, Tensor]


class ReleaseCall:
    """Timed: from q, k, v in memory to the (noised) output; forward only.

    Ours includes calibration (cached by the package after the first call), ChaCha20 noise and the ledger
    entry, in memory.
    """

    name = "release_call"
    step = "one forward call"
    ours = "dpfa"
    tolerance = 1e-5
    peers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {
        "batch": 4,
        "length": 512,
        "heads": 8,
        "head_dim": 64,
        "causal": False,
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
    }
    toy: Mapping[str, Any] = {"batch": 1, "length": 9, "heads": 2, "head_dim": 8}

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return dict(parameters)

    def contenders(self, parameters: Mapping[str, Any]) -> tuple[Contender, ...]:
        return (
            Contender(
                name="plain",
                what="scaled_dot_product_attention without clip or noise",
                build=lambda: _step(parameters, plain),
                private=False,
            ),
            Contender(
                name="dpfa",
                what="dp_flash_attn_func: value clip, attention, ChaCha20 noise in float32, ledger entry in memory",
                build=lambda: _step(parameters, ours(parameters, parameters["epsilon"])),
                private=True,
                error=lambda: error(parameters, ours(parameters, math.inf)),
                unavailable="" if find_spec("dpfa_attention") else "not installed: dpfa-attention",
            ),
            Contender(
                name="eager",
                what="value clip, scaled_dot_product_attention, torch.randn noise, add; no calibration, no ledger",
                build=lambda: _step(parameters, eager(parameters, noise_std=1.0)),
                private=True,
                error=lambda: error(parameters, eager(parameters, noise_std=0.0)),
            ),
        )


Attend = Callable[[Mapping[str, Any], Inputs], Tensor]


def ours(parameters: Mapping[str, Any], epsilon: float) -> Attend:
    from dpfa_attention import dp_flash_attn_func
    from dpfa_core.ledger import Ledger

    ledger = Ledger.memory()

    def attend(parameters: Mapping[str, Any], inputs: Inputs) -> Tensor:
        out = dp_flash_attn_func(
            *inputs,
            causal=parameters["causal"],
            epsilon=epsilon,
            delta=parameters["delta"],
            clip_norm=parameters["clip_norm"],
            ledger=ledger,
            backend=parameters.get("backend", "auto"),
        )
        assert isinstance(out, Tensor)  # noqa: S101  (no statistics were asked for)
        return out

    return attend


def eager(parameters: Mapping[str, Any], noise_std: float) -> Attend:
    def attend(parameters: Mapping[str, Any], inputs: Inputs) -> Tensor:
        q, k, v = inputs
        v = v * (parameters["clip_norm"] / v.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        out = plain(parameters, (q, k, v))
        return out + torch.randn_like(out) * noise_std

    return attend


def plain(parameters: Mapping[str, Any], inputs: Inputs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(q, k, v, is_causal=parameters["causal"]).transpose(1, 2)


def error(parameters: Mapping[str, Any], attend: Attend) -> float:
    """Relative l2 distance of the noiseless output from clipped attention in float64."""
    inputs = _inputs(parameters)
    exact = eager(parameters, noise_std=0.0)(parameters, tuple(x.double() for x in inputs))  # type: ignore[arg-type]
    difference = attend(parameters, inputs).double() - exact
    return float(difference.norm() / exact.norm())


def _step(parameters: Mapping[str, Any], attend: Attend) -> Step:
    inputs = _inputs(parameters)

    def step() -> None:
        with torch.no_grad():
            attend(parameters, inputs)

    return step


def _inputs(parameters: Mapping[str, Any]) -> Inputs:
    shape = tuple(parameters[key] for key in ("batch", "length", "heads", "head_dim"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return q, k, v
