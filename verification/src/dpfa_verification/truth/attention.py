"""Bounded attention from its definition, in float64, for tensors of a few hundred numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_core.spec import AttentionProblem, Norm


def visible(problem: AttentionProblem) -> Tensor:
    """bool [B, S, Sk]: which keys each query row sees; positions are counted from the bottom-right corner."""
    left, right = problem.window
    sees = torch.zeros(problem.batch, problem.q_len, problem.kv_len, dtype=torch.bool)
    for batch in range(problem.batch):
        queries, keys = problem.lengths[batch] if problem.lengths else (problem.q_len, problem.kv_len)
        for row in range(queries):
            for key in range(keys):
                distance = key - (row + keys - queries)
                sees[batch, row, key] = not (
                    (problem.causal and distance > 0)
                    or (left >= 0 and distance < -left)
                    or (right >= 0 and distance > right)
                )
    return sees


def finite_rows(x: Tensor) -> Tensor:
    """float64, with zeros for each row that holds a NaN or an infinity."""
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, torch.zeros((), dtype=x.dtype)).double()


def clipped(x: Tensor, clip_norm: float, norm: Norm) -> Tensor:
    """Rows scaled down to `clip_norm`."""
    length = x.abs().sum(-1, keepdim=True) if norm == "l1" else x.pow(2).sum(-1, keepdim=True).clamp_min(1e-300).sqrt()
    return x * torch.clamp(clip_norm / length.clamp_min(1e-300), max=1.0)


def attention(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, norm: Norm, softmax_scale: float) -> Tensor:
    """float64 [B, S, H, D]: clip, bounded logits, visible keys only, clip; zeros where nothing is visible."""
    q, k, v = finite_rows(q), finite_rows(k), finite_rows(v)
    clip_norm = problem.clip_norm
    if clip_norm is not None and problem.clip == "value":
        v = clipped(v, clip_norm, norm)
    sees = visible(problem)
    heads = []
    for head in range(problem.q_heads):
        source = head // (problem.q_heads // problem.kv_heads)
        logits = softmax_scale * q[:, :, head] @ k[:, :, source].mT
        if problem.logit_bound is not None:
            logits = problem.logit_bound * torch.tanh(logits / problem.logit_bound)
        logits = torch.where(sees, logits, -torch.inf)
        highest = logits.detach().amax(-1, keepdim=True)
        weights = torch.where(sees, torch.exp(logits - torch.where(torch.isfinite(highest), highest, 0.0)), 0.0)
        total = weights.sum(-1, keepdim=True)
        heads.append(weights / torch.where(total > 0, total, 1.0) @ v[:, :, source])
    out = torch.stack(heads, dim=2)
    if clip_norm is not None and problem.clip == "output":
        out = clipped(out, clip_norm, norm)
    return out
