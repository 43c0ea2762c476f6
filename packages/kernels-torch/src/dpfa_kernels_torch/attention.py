"""Attention from its definition, over blocks of rows that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from dpfa_core.contracts import SUMMED_KEYS
from dpfa_core.spec import AttentionProblem, Norm
from dpfa_kernels_torch.clipping import clip_rows, clip_rows_backward, zero_unless_finite
from dpfa_kernels_torch.visibility import key_ranges, visible_keys

LOGITS = 1 << 19
"""Logits held at a time."""

MAX_LOGIT_BOUND = 350.0
"""exp(-2 * bound) must stay a normal float64."""

FLOAT32_LOGIT_BOUND = 40.0
"""exp(-2 * bound) stays a normal float32 up to here."""


def cleaned_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    norm: Norm,
    dtype: torch.dtype,
    whiten: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the working dtype: non-finite rows are zeros, values clipped where the problem says so."""
    q, k, v = (zero_unless_finite(x.to(dtype)) for x in (q, k, v))
    if problem.clip == "value" and problem.clip_norm is not None:
        v = clip_rows(v, problem.clip_norm, norm, whiten)
    return q, k, v


def softmax_weights(logits: Tensor, visible: Tensor, logit_bound: float | None) -> tuple[Tensor, Tensor | None]:
    """exp(logits - shift) of the visible keys, 0 of the others, not yet divided by their sum; and their slopes.

    With a logit bound the shift is the bound, a public constant, and not the row's maximum: then the rounding
    of one key's weight does not depend on the other keys (PRIVACY P2).

    Returns: (weights, what one unit of a logit adds to the bounded logit; None where logits are not bounded).
    """
    logits = torch.where(torch.isfinite(logits), logits, 0.0)
    if logit_bound is None:
        highest = logits.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
        return torch.exp((logits - torch.where(torch.isfinite(highest), highest, 0.0)).where(visible, -torch.inf)), None
    if logit_bound > FLOAT32_LOGIT_BOUND:
        logits = logits.double()
    bent = torch.tanh(logits / logit_bound)
    return torch.exp(logit_bound * bent - logit_bound) * visible, 1.0 - bent * bent


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    logit_bound: float | None,
    softmax_scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(softmax_scale * q k^T + bias) v over the visible keys, logits bounded after the bias.

    Args:
        q: [B, N, H, D]; k, v: [B, M, Hk, D], finite; query head h uses key head h // (H / Hk).
        visible: bool [B or 1, N, M]; bias: [B or 1, H or 1, N, M].
    Returns: [B, N, H, D]; zeros for a row that sees no key.
    """
    _, shares, _ = _shares(q, k, visible, logit_bound, softmax_scale, bias)
    parts = zip(shares.split(SUMMED_KEYS, -1), v.split(SUMMED_KEYS, 1), strict=True)
    # one sum after the other, and no ``baddbmm``: a product may add its terms to what is there one by one
    return reduce(Tensor.add_, (torch.einsum("bkgnm,bmkd->bnkgd", *part) for part in parts)).reshape(q.shape)


def attention_rows_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    logit_bound: float | None,
    softmax_scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_rows`` for q, k and v."""
    logits, shares, slopes = _shares(q, k, visible, logit_bound, softmax_scale, bias)
    grouped, dout = (x.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]) for x in (q, dout))
    dv = torch.einsum("bkgnm,bnkgd->bmkd", shares, dout)
    dlogits = torch.einsum("bnkgd,bmkd->bkgnm", dout, v)
    dlogits = shares * (dlogits - (dlogits * shares).sum(-1, keepdim=True))
    if slopes is not None:
        dlogits = (dlogits * slopes).to(q.dtype)
    # a logit that is not finite was taken for 0, a constant
    dlogits = torch.where(torch.isfinite(logits), dlogits, 0.0) * softmax_scale
    dq = torch.einsum("bkgnm,bmkd->bnkgd", dlogits, k).reshape(q.shape)
    return dq, torch.einsum("bkgnm,bnkgd->bmkd", dlogits, grouped), dv


def _shares(
    q: Tensor, k: Tensor, visible: Tensor, logit_bound: float | None, softmax_scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, softmax in q's dtype and slopes: [B, Hk, H / Hk, N, M]."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = torch.einsum("bnkgd,bmkd->bkgnm", grouped, k) * softmax_scale
    if bias is not None:
        logits = logits + (bias[:, None] if bias.shape[1] == 1 else bias.unflatten(1, logits.shape[1:3]))
    weights, slopes = softmax_weights(logits, visible[:, None, None], logit_bound)
    total = reduce(Tensor.add_, (part.sum(-1, keepdim=True) for part in weights.split(SUMMED_KEYS, -1)))
    return logits, (weights / torch.where(total > 0, total, 1.0)).to(q.dtype), slopes


def blocks(problem: AttentionProblem) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """(batch rows, query rows, keys, visible): blocks that cover every row that sees a key."""
    start, stop = key_ranges(problem)
    rows = max(1, LOGITS // (problem.q_heads * problem.kv_len))
    batches = max(1, rows // problem.q_len)
    for batch in range(0, problem.batch, batches):
        some = slice(batch, batch + batches)
        for row in range(0, problem.q_len, rows):
            part = slice(row, row + rows)
            first, last = (x[some if problem.lengths else slice(None), part] for x in (start, stop))
            low, high = int(first.min()), int(last.max())
            if low < high:
                yield some, part, slice(low, high), visible_keys(problem, some, part, low, high)


def bias_of_block(
    bias: Tensor | None, problem: AttentionProblem, some: slice, rows: slice, keys: slice, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the logits of one block: [b or 1, H or 1, n, m] in `dtype`.

    Args: `bias` [B or 1, H or 1, S, Sk], or slopes [B or 1, H]: then it is minus the slope times the distance
    of key and row, both counted from the ends of their sequences.
    """
    if bias is None:
        return None
    if len(bias) > 1:
        bias = bias[some]
    if bias.dim() == 4:
        return bias[..., rows, keys].to(dtype)
    ahead = [m - n for n, m in problem.lengths[some] or [(problem.q_len, problem.kv_len)]]
    place = torch.arange(*rows.indices(problem.q_len), device=bias.device)[:, None]
    key = torch.arange(*keys.indices(problem.kv_len), device=bias.device)
    distance = (place - key + torch.tensor(ahead, device=bias.device)[:, None, None]).abs()
    return -bias.to(dtype)[..., None, None] * distance[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    softmax_scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention over cleaned inputs, without output clip or noise: [B, S, H, D] in their dtype."""
    out = torch.zeros_like(q)
    for some, rows, keys, visible in blocks(problem):
        out[some, rows] = attention_rows(
            q[some, rows],
            k[some, keys],
            v[some, keys],
            visible.to(q.device),
            problem.logit_bound,
            softmax_scale,
            bias_of_block(bias, problem, some, rows, keys, q.dtype),
        )
    return out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    norm: Norm,
    softmax_scale: float,
    whiten: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of noiseless attention with its output clip, for cleaned inputs; recomputes each block."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for some, rows, keys, visible in blocks(problem):
        added = bias_of_block(bias, problem, some, rows, keys, q.dtype)
        block = (
            *(q[some, rows], k[some, keys], v[some, keys]),
            *(visible.to(q.device), problem.logit_bound, softmax_scale, added),
        )
        above = dout[some, rows]
        if problem.clip == "output" and problem.clip_norm is not None:
            above = clip_rows_backward(above, attention_rows(*block), problem.clip_norm, norm, whiten)
        dq[some, rows], dk_part, dv_part = attention_rows_backward(above, *block)
        dk[some, keys] += dk_part
        dv[some, keys] += dv_part
    return dq, dk, dv


def cleaned_inputs_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    norm: Norm,
    dtype: torch.dtype,
    whiten: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of what ``cleaned_inputs`` returns to gradients of what it was given, in its dtypes."""
    dq, dk, dv = grads
    if problem.clip == "value" and problem.clip_norm is not None:
        dv = clip_rows_backward(dv, v.to(dtype), problem.clip_norm, norm, whiten)
    dq, dk, dv = (
        torch.where(torch.isfinite(x).all(-1, keepdim=True), grad, 0.0).to(x.dtype)
        for grad, x in ((dq, q), (dk, k), (dv, v))
    )
    return dq, dk, dv
