"""The noise of one release, as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_core.contracts import NoiseKey
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch.noise.draw import pairs
from dpfa_kernels_torch.noise.layout import release_counts
from dpfa_kernels_torch.noise.release_run import release_run
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


def release_noise(
    problem: AttentionProblem,
    plan: NoisePlan,
    key: NoiseKey,
    dtype: torch.dtype = torch.float32,
    mix: Tensor | None = None,
) -> Tensor:
    """The noise of a release: standard values times their scale in float64, rounded once to `dtype`.

    Where a structure projects, the noise has as many columns as it projects to, and the counters count these.

    Guarantee: tested (known counters, laws at fixed seeds, independence over every coordinate).
    Args:
        key: a key of purpose "release"; the noise lies on its device.
        mix: [D, D], a root of the noise's covariance: each row z becomes ``z @ mix.T`` before it is rounded.
    Returns: `dtype` [B, S, H, D], or [B, S, H, columns] where the plan's structure projects.
    """
    device = key.words.device
    if key.generator == "chacha20" and device.type == "cpu":
        return _run(problem, plan, key, dtype, mix)
    return noise_by_definition(problem, plan, key, dtype, mix)


def _run(problem: AttentionProblem, plan: NoisePlan, key: NoiseKey, dtype: torch.dtype, mix: Tensor | None) -> Tensor:
    B, S, H, D = problem.batch, problem.q_len, problem.q_heads, drawn_columns(plan, problem.head_dim)
    scale = noise_scale(problem, plan)
    if scale.numel() > 1:
        scale = scale.expand(B, S, H).transpose(1, 2).reshape(B * H, S)
    noise = torch.empty(B * H, S, D, dtype=dtype if mix is None else torch.float64)
    release_run(key, plan.distribution, plan.transform, batch=B, heads=H, scale=scale, columns=D, out=noise)
    if mix is not None:
        noise = torch.cat([(part @ mix.to(part).T).to(dtype) for part in noise.split(max(1, CHUNK // (S * D)))])
    return noise.reshape(B, H, S, D).transpose(1, 2)


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
