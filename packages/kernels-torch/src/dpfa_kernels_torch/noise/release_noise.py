"""The noise of one release."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.noise.draw import pairs
from dpfa_kernels_torch.noise.layout import release_counts
from dpfa_kernels_torch.noise.release_run import add_release_run_
from dpfa_kernels_torch.visibility import visible_counts

CHUNK = 1 << 18
"""Noise values computed at a time: bounds the float64 working set to a few megabytes."""


def noise_scale(problem: AttentionProblem, plan: NoisePlan) -> Tensor:
    """The scale of each row and head: float64 [B or 1, S or 1, H or 1] on the CPU."""
    head = torch.tensor(plan.head_scale, dtype=torch.float64)
    row = torch.tensor(plan.row_scale, dtype=torch.float64)
    if len(plan.row_scale) == 1:
        return (head * row).reshape(1, 1, -1)
    return row[visible_counts(problem)].unsqueeze(-1) * head


def drawn_columns(plan: NoisePlan, head_dim: int) -> int:
    """Columns of noise of one row of one head: fewer than head_dim where a structure projects."""
    structure = plan.structure
    if structure is None or structure.kind == "block_diagonal":
        return head_dim
    return int(dict(structure.parameters)["rank" if structure.kind == "low_rank" else "kept"])


class ReleaseRun(Protocol):
    """Adds the ChaCha20 noise of a whole release to x (B, S, H, columns) on the CPU, in place."""

    def __call__(self, x: Tensor, scale: Tensor, key: NoiseKey, distribution: str, transform: str) -> None: ...


def release_noise(
    problem: AttentionProblem,
    plan: NoisePlan,
    key: NoiseKey,
    dtype: torch.dtype = torch.float32,
    mix: Tensor | None = None,
) -> Tensor:
    """The noise of a release alone: what ``add_release_noise_`` adds to zeros.

    Returns: `dtype` [B, S, H, D], or [B, S, H, columns] where the plan's structure projects.
    """
    columns = drawn_columns(plan, problem.head_dim)
    shape = (problem.batch, problem.q_len, problem.q_heads, columns)
    return add_release_noise_(torch.zeros(shape, dtype=dtype, device=key.words.device), problem, plan, key, mix)


def add_release_noise_(
    x: Tensor,
    problem: AttentionProblem,
    plan: NoisePlan,
    key: NoiseKey,
    mix: Tensor | None = None,
    run: ReleaseRun = add_release_run_,
) -> Tensor:
    """Add a release's noise to `x`, in place: standard values times their scale in float64, rounded once to x's dtype.

    Where a structure projects, the noise has as many columns as it projects to, and the counters count these.

    Guarantee: tested (known counters, laws at fixed seeds, independence over every coordinate).
    Args:
        x: float32 or float64 [B, S, H, D], or [B, S, H, columns] where the plan's structure projects.
        key: a key of purpose "release", on x's device.
        mix: [D, D], a root of the noise's covariance: each row z becomes ``z @ mix.T`` before it is rounded.
        run: what adds ChaCha20 noise on the CPU; by default this package's own.
    Returns: `x`.
    """
    if key.generator != "chacha20" or key.words.device.type != "cpu":
        return x.add_(noise_by_definition(problem, plan, key, x.dtype, mix))
    target = x if mix is None else torch.zeros_like(x, dtype=torch.float64)
    scale = noise_scale(problem, plan).expand(x.shape[:3])
    run(target, scale, key, plan.distribution, plan.transform)
    if mix is not None:
        rows = max(1, CHUNK // x[:, :1].numel())
        for part, noise in zip(x.split(rows, dim=1), target.split(rows, dim=1), strict=True):
            part += (noise @ mix.to(noise).T).to(x.dtype)
    return x


def noise_by_definition(
    problem: AttentionProblem, plan: NoisePlan, key: NoiseKey, dtype: torch.dtype, mix: Tensor | None = None
) -> Tensor:
    """``release_noise`` value by value, on every device, by every generator: the fast run is compared with it."""
    device = key.words.device
    B, S, H, D = problem.batch, problem.q_len, problem.q_heads, drawn_columns(plan, problem.head_dim)
    counts = release_counts(H, D)
    scale = noise_scale(problem, plan).to(device).expand(B, S, H).transpose(1, 2).reshape(B * H, S, 1)
    release = key.release.view(torch.int64).reshape(1, 1, 1)
    streams = torch.arange(B * H, device=device).reshape(-1, 1, 1)
    rows = torch.arange(S, device=device).reshape(1, -1, 1)
    columns = torch.arange(0, D, 2, device=device).reshape(1, 1, -1)

    noise = torch.empty(B * H, S, D, dtype=dtype, device=device)
    row_step = max(1, CHUNK // D)
    stream_step = max(1, CHUNK // (D * S))
    for first in range(0, B * H, stream_step):
        some = slice(first, first + stream_step)
        for first_row in range(0, S, row_step):
            part = slice(first_row, first_row + row_step)
            coordinates = {
                "batch": streams[some] // H,
                "head": streams[some] % H,
                "row": rows[:, part],
                "column": columns,
                "release": release,
            }
            values = pairs(key, plan.distribution, plan.transform, coordinates, counts).flatten(-2)
            values = values[..., :D] * scale[some, part]
            noise[some, part] = (values if mix is None else values @ mix.to(values).T).to(dtype)
    return noise.reshape(B, H, S, D).transpose(1, 2)
