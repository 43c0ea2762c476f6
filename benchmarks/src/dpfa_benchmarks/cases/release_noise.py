"""The secure noise of a release against torch.randn of the same count and dtype, and what it adds to a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpfa_benchmarks.case import Contender, Step
from dpfa_benchmarks.cases import release_call
from dpfa_core import selection
from dpfa_core.spec import AttentionProblem, NoisePlan

PROFILES = {"float32": "bm64", "float64": "bm64", "bfloat16": "bm32", "float16": "bm32"}
"""dtype to the profile that its releases take."""


class ReleaseNoise:
    """Timed: fresh Gaussian noise in the output's dtype, ChaCha20 with a key from the system; then two whole calls."""

    name = "release_noise"
    step = "the noise of one release, or one forward call"
    ours = "dpfa"
    tolerance = 1e-5
    peers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {
        "batch": 4,
        "length": 512,
        "heads": 8,
        "head_dim": 64,
        "dtype": "float32",
        "backend": "auto",
    }
    toy: Mapping[str, Any] = {"batch": 1, "length": 9, "heads": 2, "head_dim": 8}

    def settled(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        if parameters["dtype"] not in PROFILES:
            raise ValueError(f"dtype must be one of {', '.join(PROFILES)}, got {parameters['dtype']!r}.")
        chosen = selection.select("release", *_asked(parameters), parameters["backend"])
        return {**parameters, "backend": chosen.name}

    def contenders(self, parameters: Mapping[str, Any]) -> tuple[Contender, ...]:
        shape, dtype = _shape(parameters), getattr(torch, parameters["dtype"])
        missing = "" if find_spec("dpfa_attention") else "not installed: dpfa-attention"
        return (
            Contender(
                name="randn",
                what="torch.randn: not secure",
                build=lambda: lambda: torch.randn(shape, dtype=dtype),
                private=False,
            ),
            Contender(
                name="dpfa",
                what="a release's noise by the backend that releases take here, see the parameter",
                build=lambda: _noise(parameters, parameters["backend"]),
                private=True,
                error=lambda: error(parameters, parameters["backend"]),
            ),
            Contender(
                name="torch",
                what="a release's noise by the torch backend",
                build=lambda: _noise(parameters, "torch"),
                private=True,
                error=lambda: error(parameters, "torch"),
            ),
            Contender(
                name="call_without",
                what="dp_flash_attn_func at epsilon = inf with a value clip: no noise",
                build=lambda: _call(parameters, math.inf),
                private=False,
                unavailable=missing,
            ),
            Contender(
                name="call_with",
                what="dp_flash_attn_func at epsilon = 8, delta = 1e-5",
                build=lambda: _call(parameters, 8.0),
                private=False,
                unavailable=missing,
            ),
        )


def error(parameters: Mapping[str, Any], backend: str) -> float:
    """Relative l2 distance of the noise of one key from that of its definition."""
    from dpfa_kernels_torch.noise.keys import KeySource
    from dpfa_kernels_torch.noise.release_noise import noise_by_definition

    key = KeySource().next_release("release", torch.device("cpu"))
    problem, plan = _asked(parameters)
    found = _drawn(backend, problem, plan, key).double()
    exact = noise_by_definition(problem, plan, key, torch.float64)
    return float((found - exact).norm() / exact.norm())


def _drawn(backend: str, problem: AttentionProblem, plan: NoisePlan, key: Any) -> Tensor:
    from dpfa_kernels_torch.noise.release_noise import add_release_noise_

    dtype = torch.float64 if problem.dtype == "float64" else torch.float32  # in which noise is added, before rounding
    x = torch.zeros(problem.batch, problem.q_len, problem.q_heads, problem.head_dim, dtype=dtype)
    return add_release_noise_(x, problem, plan, key, run=selection.backend(backend).release_run)


def _noise(parameters: Mapping[str, Any], backend: str) -> Step:
    from dpfa_kernels_torch.noise.keys import KeySource

    source, dtype = KeySource(), getattr(torch, parameters["dtype"])
    problem, plan = _asked(parameters)

    def step() -> Tensor:
        key = source.next_release("release", torch.device("cpu"))
        return _drawn(backend, problem, plan, key).to(dtype)

    return step


def _call(parameters: Mapping[str, Any], epsilon: float) -> Step:
    asked = {"causal": False, "delta": 1e-5, "clip_norm": 1.0, "backend": parameters["backend"]}
    attend: Callable[..., Tensor] = release_call.ours(asked, epsilon)
    shape, dtype = _shape(parameters), getattr(torch, parameters["dtype"])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))

    def step() -> None:
        with torch.no_grad():
            attend(asked, (q, k, v))

    return step


def _shape(parameters: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return parameters["batch"], parameters["length"], parameters["heads"], parameters["head_dim"]


def _asked(parameters: Mapping[str, Any]) -> tuple[AttentionProblem, NoisePlan]:
    batch, length, heads, head_dim = _shape(parameters)
    problem = AttentionProblem(
        batch=batch,
        q_len=length,
        kv_len=length,
        q_heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=parameters["dtype"],
        clip_norm=1.0,
    )
    plan = NoisePlan(
        mechanism="gaussian", distribution="gaussian", head_scale=(1.0,), transform=PROFILES[parameters["dtype"]]
    )
    return problem, plan
