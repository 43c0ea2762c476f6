"""Noise on the attention scores, for research: what it covers are queries and keys, never the values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from dpfa_attention import functional
from dpfa_attention.module_masks import outside
from dpfa_attention.noise_keys import release_key
from dpfa_attention.options import resolve, scale_of_logits
from dpfa_attention.pricing import priced_release
from dpfa_attention.problem import attention_problem
from dpfa_attention.recomputation import checkpointed, in_backward
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.structure_tensors import NONE
from dpfa_core import selection
from dpfa_core.checks import one_of, require
from dpfa_core.errors import NotPrivateError
from dpfa_core.events import NonPrivate
from dpfa_core.plugin_names import parts
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, PrivacySpec


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would keep one noise as a constant
def attention_of_noised_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: PrivacySpec,
    *,
    values: Literal["public", "private"],
    logit_bound: float,
    mechanism: str = "gaussian",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    lengths: tuple[tuple[int, int], ...] = (),
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
    seed: int | None = None,
    ledger: int = 0,
) -> tuple[Tensor, PrivacyStats]:
    """softmax(bounded scores + noise) v: the scores are a release, the rest is made of it and of v.

    A row of scores holds Sk numbers of at most `logit_bound`, so it is a row of an ordinary release with head_dim Sk,
    clipped to logit_bound sqrt(Sk). Values go through without noise: with one visible key the output is the value. So
    the call is ``NonPrivate`` unless they are declared public, which the ledger notes.

    Guarantee: tested (for queries and keys, where values are public).
    Args: q [B, S, H, D]; k, v [B, Sk, Hk, D]; `mechanism`, gaussian or an alias of it; `bias`, public, [B or 1, H or 1,
        S, Sk], enters before the bound; `ledger`, its number.
    Raises: PrivacyParameterError for another unit, mechanism, or an infinite epsilon; NotPrivateError where it could
        run twice for one output; as ``dp_flash_attn_func``.
    """
    one_of("values", values, ("public", "private"))
    require(spec.unit == "sequence", 'noise on scores protects unit="sequence"', spec.unit)
    require(math.isfinite(spec.epsilon), "noise on scores needs a finite epsilon", spec.epsilon)
    name, accountant = resolve(mechanism)
    require(parts(name)[0] == "gaussian", "noise on scores must be gaussian", mechanism)
    if in_backward() or checkpointed(gradients=torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active():
        raise NotPrivateError(
            "noise on scores must be drawn once for each output, got a call inside a checkpointed region, a backward "
            "pass or a transform of torch.func; keep it outside."
        )
    asked = attention_problem(
        q,
        k,
        v,
        causal=causal,
        window=window_size,
        clip="output",
        clip_norm=1.0,
        logit_bound=logit_bound,
        lengths=lengths,
        mask=mask,
    )
    problem = dataclasses.replace(
        asked,
        kv_heads=asked.q_heads,
        head_dim=asked.kv_len,
        clip_norm=logit_bound * math.sqrt(asked.kv_len),
        logit_bound=None,
        dtype="float32",
    )
    book = functional.ledger_numbered(ledger, spec)
    priced = priced_release(MECHANISMS.entry(name), accountant, spec, problem, book.delta or 0.0)
    chosen = selection.select("privatize", problem, priced.plan, backend).name
    key = release_key(seed, q.device)
    covered = values == "public"
    notes = {"values declared public": covered, "noise from a seed, not secure": not key.secure}
    event_id = book.record(
        priced.event if covered else NonPrivate(),
        purpose="; ".join(("release of scores", *(note for note, applies in notes.items() if applies))),
        mechanism=priced.mechanism,
        backend=chosen,
    )
    scores = bounded_scores(q, k, logit_bound, bias)
    released = selection.backend(chosen).privatize_(
        scores.detach().clone(), problem, priced.plan, NONE, key, clip_rows=True
    )
    noised: Tensor = _Released.apply(scores, released)  # type: ignore[no-untyped-call]
    weights = visible_softmax(noised, problem, mask)
    mixed = torch.einsum("bihj,bjhd->bihd", weights, _each_head(_finite_rows(v.float()), problem.q_heads))
    return mixed.to(q.dtype), PrivacyStats.of(
        spec,
        priced,
        epsilon_spent=priced.epsilon if covered else math.inf,
        backend=chosen,
        event_id=event_id,
        secure_noise=key.secure,
    )


class _Released(torch.autograd.Function):
    """What was released, with the gradient of what it was made of: noise has none."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, released: Tensor) -> Tensor:
        return released.view_as(released)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def bounded_scores(q: Tensor, k: Tensor, logit_bound: float, bias: Tensor | None = None) -> Tensor:
    """float32 [B, S, H, Sk], each within the bound; what is not finite becomes 0 (PRIVACY P2)."""
    q, k = _finite_rows(q.float()), _finite_rows(k.float())
    logits = torch.einsum("bihd,bjhd->bihj", q, _each_head(k, q.shape[2])) * scale_of_logits(None, q.shape[3])
    if bias is not None:
        logits = logits + bias.transpose(1, 2)
    logits = torch.where(logits.isfinite(), logits, 0.0)
    return logit_bound * torch.tanh(logits / logit_bound)


def visible_softmax(scores: Tensor, problem: AttentionProblem, mask: Tensor | None = None) -> Tensor:
    """Over the keys that each row sees, [B, S, H, Sk]; zeros for a row that sees none. `mask` is the problem's."""
    rows = problem.lengths or ((problem.q_len, problem.kv_len),) * problem.batch
    shown = torch.zeros(problem.batch, problem.q_len, problem.kv_len, dtype=torch.bool)
    for row, (queries, keys) in enumerate(rows):
        shown[row, :queries, :keys] = ~outside(queries, keys, causal=problem.causal, window=problem.window)
    if mask is not None:
        shown &= mask.cpu()
    shown = shown[:, :, None].to(scores.device)
    weights = scores.masked_fill(~shown, -math.inf).softmax(-1)
    return torch.where(shown, weights, 0.0)


def _each_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def _finite_rows(x: Tensor) -> Tensor:
    return torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0)
