"""The call: promise in, noised attention out, recorded before it leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from dpfa_attention.autograd import release
from dpfa_attention.default_ledger import process_ledger
from dpfa_attention.head_budgets import as_numbers
from dpfa_attention.noise_keys import release_key
from dpfa_attention.options import bound_of_logits, refuse_what_is_not_offered, resolve, scale_of_logits
from dpfa_attention.pricing import noiseless_release, priced_release
from dpfa_attention.problem import attention_problem
from dpfa_attention.stats import PrivacyStats
from dpfa_core import selection
from dpfa_core.checks import one_of, require
from dpfa_core.errors import LedgerError, NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import PrivacySpec, Relation, Unit

Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_graphs(function: Function) -> Function:
    # Compiled, two equal calls would become one, with the same noise twice.
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@_outside_graphs
def dp_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    epsilon: float,
    delta: float,
    unit: Unit = "sequence",
    relation: Relation = "replace",
    queries: Literal["public", "private"] | None = None,
    clip_norm: float | None = None,
    clip: Literal["value", "output"] = "value",
    logit_bound: float | None = None,
    mechanism: str = "gaussian",
    noise_structure: str | None = None,
    head_epsilons: Sequence[float] | None = None,
    allow_infinite_heads: bool = False,
    backend: str = "auto",
    seed: int | None = None,
    ledger: Ledger | None = None,
    return_privacy_stats: bool = False,
    _lengths: tuple[tuple[int, int], ...] = (),
) -> Tensor | tuple[Tensor, PrivacyStats]:
    """Attention whose output is (epsilon, delta)-differentially private for one record of `unit`.

    Rows are clipped, the noise that the promise needs is added in the backend, and the release is in the
    ledger before the output exists. Arguments up to `return_attn_probs` mean what they mean in flash-attn;
    causal masks and windows are aligned bottom-right, and a query head h uses key head h // (H / Hk).

    | asked for | what happens |
    |---|---|
    | epsilon finite | clip (`clip_norm` None means 1.0), noise, a priced event |
    | epsilon inf, `clip_norm` None | plain attention, the event ``NonPrivate`` |
    | epsilon inf, `clip_norm` given | clipped attention without noise, the event ``NonPrivate`` |
    | `head_epsilons`, epsilon finite | heads share epsilon: the list fixes the ratios of their mu |
    | `head_epsilons`, epsilon inf | each head costs what the list says; the total is priced and recorded |

    What the guarantee does not cover: gradients into what made q, k and v; residual connections around the
    call; anything else computed from the same records. A recomputed forward (activation checkpointing) would
    be a second release and is refused.

    Guarantee: tested (sensitivity by replaced records, noise law, price by a second package).
    Args:
        q: [B, S, H, D]; k, v: [B, Sk, Hk, D]; one device and one dtype: float32, bfloat16 or float16
            (float64 only with epsilon inf).
        softcap: > 0 is `logit_bound`.
        deterministic: accepted; the torch backend always is.
        epsilon, delta: of this call; a limit on many calls is the ledger's budget.
        unit: "sequence", one batch row; "token", which needs `queries`, `logit_bound` and clip="value".
        relation: "replace", or "add_or_remove" by a null record in the same place.
        queries: "public" declares that q holds no part of the record; it is written into the ledger.
        clip_norm: bound on each row of v (clip="value") or of each head's output (clip="output"), in the
            mechanism's norm, in the units of v.
        logit_bound: logits become B * tanh(logit / B).
        mechanism: an installed one, or "pld" (gaussian, calibrated by PLD), "standard" and "renyi_gaussian"
            (gaussian, calibrated by RDP), "laplacian" (laplace), "structured_noise" (`noise_structure`).
        noise_structure: "low_rank", "sparse", "block_diagonal" or "attention_aware": the mechanism of that name
            with its default parameters. The first two release a projection of the output, block_diagonal clips in
            the norm of its noise, attention_aware needs unit="token".
        head_epsilons: one number > 0 for each of the H heads, public.
        allow_infinite_heads: accept math.inf in `head_epsilons`: heads released without noise. The event is then
            ``NonPrivate`` and epsilon_spent infinite.
        backend: an installed one, or "auto".
        seed: None for noise nobody can predict. An integer makes the noise of the n-th call with it the same
            in every process: not secure, and the ledger says so.
        ledger: where the release is charged; None is ``process_ledger(unit, relation)``.
        dropout_p, alibi_slopes, return_attn_probs: refused by name unless they have their defaults.

    Returns: out [B, S, H, D] in q's dtype; with `return_privacy_stats` the pair (out, PrivacyStats).

    Raises:
        PrivacyParameterError: a value or combination that cannot be used, before any tensor is read.
        NotPrivateError: attention probabilities asked for, or a call inside a backward pass.
        PluginError: the mechanism or backend is missing, broken or disagrees with accounting.
        UnsupportedEvent: no accountant can price the mechanism.
        BackendUnavailable: no backend can run it; the text lists why.
        LedgerError, BudgetExhausted: not recorded, so not computed.
    """
    refuse_what_is_not_offered(
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        head_epsilons=head_epsilons,
        allow_infinite_heads=allow_infinite_heads,
    )
    _refuse_second_runs()
    spec = PrivacySpec(epsilon=epsilon, delta=delta, unit=unit, relation=relation, queries=queries)
    one_of("unit", unit, ("sequence", "token"), "Examples and users are units of training.")
    head_budget = as_numbers(head_epsilons)
    private = not math.isinf(epsilon) or head_budget is not None
    problem = attention_problem(
        q,
        k,
        v,
        causal=causal,
        window=window_size,
        clip=clip,
        clip_norm=1.0 if private and clip_norm is None else clip_norm,
        logit_bound=bound_of_logits(softcap, logit_bound),
    )
    if _lengths:  # of padded batches: see varlen, kv_cache and sdpa_layout
        problem = dataclasses.replace(problem, lengths=_lengths)
    scale = scale_of_logits(softmax_scale, problem.head_dim)
    ledger = _fitting(ledger, spec)

    name, accountant = resolve(mechanism, noise_structure)
    entry = MECHANISMS.entry(name)
    if private:
        lifetime = ledger.delta or 0.0
        priced = priced_release(entry, accountant, spec, problem, lifetime, head_budget, allow_infinite_heads)
    else:
        priced = noiseless_release(entry, problem)
    chosen = selection.select("release", problem, priced.plan, backend).name
    key = release_key(seed, q.device)

    purpose = "release"
    if queries == "public":
        purpose += "; queries declared public"
    if not key.secure:
        purpose += "; noise from a seed, not secure"
    if priced.plan.noiseless_heads:
        purpose += "; some heads without noise"
    event_id = ledger.record(priced.event, purpose=purpose, mechanism=priced.mechanism, backend=chosen)
    out = release(q, k, v, problem, priced.plan, key, selection.backend(chosen), scale)
    if not return_privacy_stats:
        return out
    return out, PrivacyStats(
        epsilon_spent=priced.epsilon,
        delta=spec.delta,
        unit=unit,
        relation=relation,
        privacy_mechanism=priced.mechanism,
        noise_multiplier=priced.noise_multiplier,
        noise_std=priced.noise_std,
        backend=chosen,
        event_id=event_id,
        secure_noise=key.secure,
        head_epsilons=priced.head_epsilons,
        head_noise_scales=priced.plan.head_scale if head_budget else (),
    )


def _fitting(ledger: Ledger | None, spec: PrivacySpec) -> Ledger:
    """The ledger to charge; it must be kept for the records that `spec` protects."""
    if ledger is None:
        return process_ledger(spec.unit, spec.relation)
    require(
        isinstance(ledger, Ledger),
        "ledger must be None or a dpfa_core.ledger.Ledger",
        ledger,
        "A file is opened by Ledger.open(path, unit=..., relation=..., delta=...).",
    )
    for term in ("unit", "relation"):
        kept, asked = getattr(ledger, term), getattr(spec, term)
        if kept not in (None, asked):
            raise LedgerError(
                f"this call needs a ledger kept for {term}={asked!r}, got one for {kept!r}; "
                "open another ledger, or ask for the promise that this one keeps."
            )
    return ledger


def _refuse_second_runs() -> None:
    """One call is one release: neither run again, nor run once for several outputs."""
    # Only inside a running backward pass is there a graph task: that is where checkpointing recomputes.
    if torch._C._current_graph_task_id() != -1:
        raise NotPrivateError(
            "dp_flash_attn_func must run once for each output, got a call inside a backward pass, as "
            "torch.utils.checkpoint makes it: that would be a second release with other noise; keep the call "
            "outside what is checkpointed."
        )
    if torch._C._are_functorch_transforms_active():
        raise NotPrivateError(
            "dp_flash_attn_func must run once for each output, got a call inside a torch.func transform: vmap "
            "would give all its outputs the same noise; call it on the whole batch, outside the transform."
        )
