"""Problems, inputs and keys for the examinations of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey, PlanTensors
from dpfa_core.spec import AttentionProblem, NoisePlan

SILENT = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,))
NO_TENSORS = PlanTensors()
GENERATORS = ("chacha20", "philox4x32-10")


COVERING: tuple[dict[str, Any], ...] = (
    {"q_len": 17, "kv_len": 33, "causal": True, "q_heads": 6, "head_dim": 40, "logit_bound": 0.5},
    {"lengths": ((7, 3), (2, 7)), "clip": "output", "head_dim": 5, "dtype": "bfloat16"},
    {"q_len": 33, "kv_len": 17, "window": (3, 2), "dtype": "float16", "logit_bound": 3.0, "clip_norm": 0.5},
    {"q_len": 1, "kv_len": 33, "causal": True, "window": (3, -1), "clip": "output", "clip_norm": 0.5},
    {"q_len": 17, "kv_len": 17, "lengths": ((17, 5), (9, 17)), "causal": True, "head_dim": 5, "logit_bound": 3.0},
    {"batch": 1, "q_len": 7, "kv_len": 33, "q_heads": 2, "head_dim": 40, "clip": "output", "logit_bound": 0.5},
)
"""Problems that together have every feature: what fewer trials than these look at is these."""


class Bench:
    """A source of everything random; all of it follows from `seed`, which counterexamples carry."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self.dice = np.random.default_rng(seed)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.from_numpy(self.dice.standard_normal(shape) * scale).to(dtype).to(self.device)

    def inputs(self, problem: AttentionProblem, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
        dtype = getattr(torch, problem.dtype)
        queries = (problem.batch, problem.q_len, problem.q_heads, problem.head_dim)
        keys = (problem.batch, problem.kv_len, problem.kv_heads, problem.head_dim)
        return self.tensor(queries, dtype, scale), self.tensor(keys, dtype, scale), self.tensor(keys, dtype, scale)

    def key(self, purpose: Any = "release", generator: Any = "chacha20", release: int = 0) -> NoiseKey:
        """A fresh key."""
        return self.key_of(self.secret(generator), purpose, generator, release)

    def secret(self, generator: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return self.dice.integers(0, 2**32, 8 if generator == "chacha20" else 2, dtype=np.uint32)

    def key_of(self, secret: Any, purpose: Any, generator: Any, release: int = 0) -> NoiseKey:
        return NoiseKey(
            generator,
            purpose,
            torch.from_numpy(secret.copy()).to(self.device),
            torch.tensor([release], dtype=torch.uint64).to(self.device),
            secure=False,
        )

    def problem(self, **fields: Any) -> AttentionProblem:
        sizes: dict[str, Any] = {"batch": 2, "q_len": 7, "kv_len": 7, "q_heads": 4, "kv_heads": 2, "head_dim": 8}
        return AttentionProblem(**sizes | {"clip_norm": 1.0, "device": self.device} | fields)

    def problems(self, count: int) -> Iterator[AttentionProblem]:
        """The covering problems, then random ones."""
        for number in range(count):
            yield self.problem(**COVERING[number]) if number < len(COVERING) else self.random_problem()

    def random_problem(self) -> AttentionProblem:
        """Odd sizes, grouped heads, every mask, clip and bound."""
        pick = self.dice.choice
        q_len, kv_len = (int(x) for x in pick((1, 2, 7, 17, 33), 2))
        kv_heads = int(pick((1, 2)))
        batch = int(pick((1, 3)))
        lengths: tuple[tuple[int, int], ...] = ()
        if pick((False, False, True)):
            lengths = tuple(
                (int(self.dice.integers(0, q_len + 1)), int(self.dice.integers(0, kv_len + 1))) for _ in range(batch)
            )
        side = int(pick((-1, -1, 0, 3)))
        return self.problem(
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            kv_heads=kv_heads,
            q_heads=kv_heads * int(pick((1, 3))),
            head_dim=int(pick((5, 8, 40))),
            lengths=lengths,
            causal=bool(pick((False, True))),
            window=(side, int(pick((-1, 2)))) if side >= 0 else (-1, -1),
            clip=str(pick(("value", "output"))),
            clip_norm=float(pick((0.5, 2.0))),
            logit_bound=float(pick((0.5, 3.0))) if pick((False, True)) else None,
            dtype=str(pick(("float32", "bfloat16", "float16"))),
        )


def plan(**fields: Any) -> NoisePlan:
    """Unit Gaussian noise by the 53-bit profile."""
    base: dict[str, Any] = {"mechanism": "given", "distribution": "gaussian", "head_scale": (1.0,), "transform": "bm64"}
    return NoisePlan(**base | fields)


def flat(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return x.detach().double().cpu().numpy().reshape(-1)


def transform_for(problem: AttentionProblem) -> str:
    """float32 outputs show where a 32-bit sampler ends."""
    return "bm64" if problem.dtype == "float32" else "bm32"
