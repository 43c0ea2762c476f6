"""What happens to attention's output before it leaves: clip, project, noise, lift."""

from __future__ import annotations

from torch import Tensor

from dpfa_core.contracts import NoiseKey, PlanTensors
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.clipping import clip_rows, zero_unless_finite
from dpfa_kernels_torch.noise.discrete_noise import discrete_noise
from dpfa_kernels_torch.noise.release_noise import ReleaseRun, add_release_noise_
from dpfa_kernels_torch.noise.release_run import add_release_run_
from dpfa_kernels_torch.products import product


def epilogue(
    x: Tensor,
    problem: AttentionProblem,
    plan: NoisePlan,
    tensors: PlanTensors,
    key: NoiseKey,
    *,
    clip: bool,
    run: ReleaseRun = add_release_run_,
) -> Tensor:
    """The rows of x clipped (if asked) and noised, in x's dtype: float32 or float64, not yet rounded.

    A structure with a projection is noised where it projects to, and lifted after that sum was rounded: then all
    that leaves is a function of noised numbers.

    Source: PRIVACY P5.
    """
    x = clip_rows(x, problem.clip_norm, plan.norm, tensors.whiten) if clip else zero_unless_finite(x)
    if tensors.project is not None:
        x = product(x, tensors.project)
    if plan.distribution == "discrete_gaussian":
        # both are integers of float64, so their sum is exact; rounding it afterwards hides nothing and shows nothing
        return (((x.double() / plan.grid).round() + discrete_noise(problem, plan, key)) * plan.grid).to(x.dtype)
    if plan.distribution != "none":
        add_release_noise_(x, problem, plan, key, None if tensors.project is not None else tensors.mix, run)
    return x if tensors.project is None else product(x, tensors.mix.T)
