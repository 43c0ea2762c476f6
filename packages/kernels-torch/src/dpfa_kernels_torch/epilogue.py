"""What happens to attention's output before it leaves: clip, then noise."""

from __future__ import annotations

from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.clipping import clip_rows, zero_unless_finite
from dpfa_kernels_torch.noise.release_noise import release_noise


def epilogue(x: Tensor, problem: AttentionProblem, plan: NoisePlan, key: NoiseKey, *, clip: bool) -> Tensor:
    """The rows of x clipped (if asked) and noised, in x's dtype: float32 or float64, not yet rounded."""
    x = clip_rows(x, problem.clip_norm, plan.norm) if clip else zero_unless_finite(x)
    if plan.distribution == "none":
        return x
    return x + release_noise(problem, plan, key, x.dtype)
