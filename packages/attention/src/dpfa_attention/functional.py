"""The call: promise in, noised attention out, recorded before it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dpfa_attention.adaptive_clip import moved_clip as moved_clip
from dpfa_attention.autograd import release
from dpfa_attention.biases import alibi, without_gradient
from dpfa_attention.default_ledger import ledger_numbered, number_and_delta
from dpfa_attention.options import bound_of_logits, refuse_what_is_not_offered
from dpfa_attention.recomputation import tracing_checkpoint
from dpfa_attention.release_op import DRAWN, draw_release, line_of
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.tensor_release import tensor_mechanism, tensor_release
from dpfa_attention.terms import Agreed, Terms, agreed, bits
from dpfa_core.contracts import TensorMechanism
from dpfa_core.ledger import Ledger
from dpfa_core.spec import PrivacySpec, Relation, Unit


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
    mechanism: str | TensorMechanism = "gaussian",
    noise_structure: str | None = None,
    head_epsilons: Sequence[float] | None = None,
    allow_infinite_heads: bool = False,
    backend: str = "auto",
    seed: int | None = None,
    ledger: Ledger | None = None,
    return_privacy_stats: bool = False,
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
    call; anything else computed from the same records. A forward that torch.utils.checkpoint recomputes is the
    same release: the same noise, charged once.

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
            (gaussian, calibrated by RDP), "laplacian" (laplace), "structured_noise" (`noise_structure`). A name
            may carry parameters, "low_rank(rank=8)", and fix the noise, "gaussian(noise_multiplier=4.0)": then epsilon
            is the most that it may cost. An object with ``add_noise`` is the slow path of ``DPMechanism``.
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
        alibi_slopes: public, floating-point [H] or [B, H]: the logit of row i and key j gets -slope times their
            distance, |i + Sk - S - j|, before it is bounded, so that no sensitivity changes. They have no gradient:
            slopes that require one are refused.
        dropout_p, return_attn_probs: refused by name unless they have their defaults.

    Returns: out [B, S, H, D] in q's dtype; with `return_privacy_stats` the pair (out, PrivacyStats).

    Raises:
        PrivacyParameterError: a value or combination that cannot be used, before any tensor is read.
        NotPrivateError: attention probabilities or the gradient of a bias asked for, or a call inside a backward pass.
        PluginError: the mechanism or backend is missing, broken or disagrees with accounting.
        UnsupportedEvent: no accountant can price the mechanism.
        BackendUnavailable: no backend can run it; the text lists why.
        LedgerError, BudgetExhausted: not recorded, so not computed.
    """
    result: Tensor | tuple[Tensor, PrivacyStats] = released(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        relation=relation,
        queries=queries,
        clip_norm=clip_norm,
        clip=clip,
        logit_bound=logit_bound,
        mechanism=mechanism,
        noise_structure=noise_structure,
        head_epsilons=head_epsilons,
        allow_infinite_heads=allow_infinite_heads,
        backend=backend,
        seed=seed,
        ledger=ledger,
        return_privacy_stats=return_privacy_stats,
    )
    return result


def released(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: tuple[tuple[int, int], ...] = (),
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_attn_probs: bool = False,
    epsilon: float,
    delta: float,
    unit: Unit = "sequence",
    relation: Relation = "replace",
    queries: Literal["public", "private"] | None = None,
    clip_norm: float | None = None,
    clip: Literal["value", "output"] = "value",
    logit_bound: float | None = None,
    mechanism: str | TensorMechanism = "gaussian",
    noise_structure: str | None = None,
    head_epsilons: Sequence[float] | None = None,
    allow_infinite_heads: bool = False,
    backend: str = "auto",
    seed: int | None = None,
    ledger: Ledger | None = None,
    return_privacy_stats: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    compute: Callable[..., Tensor] | None = None,
) -> Any:
    """``dp_flash_attn_func`` of a batch that is padded to `lengths`, (queries, keys) of each row; empty means full.

    `mask`, bool [S, Sk], True where it shows, is public and the same for every batch row and head; what causal and
    window hide stays hidden.
    `bias` is public, [B or 1, H or 1, S, Sk], finite, and added to the logits before they are bounded. `compute` makes
    the output of q, k, v, the ticket and the terms; None is ``release``, and another one may keep
    less for the backward pass. A mechanism that works on tensors does without.
    """
    compute = compute or release
    bias = without_gradient(alibi(alibi_slopes, q) if bias is None else bias)
    refuse_what_is_not_offered(
        dropout_p=dropout_p,
        return_attn_probs=return_attn_probs,
        head_epsilons=head_epsilons,
        allow_infinite_heads=allow_infinite_heads,
    )
    number, ledger_delta = number_and_delta(ledger)
    # a graph holds names; one that it cannot plan with is refused where it runs
    custom = None
    if not (isinstance(mechanism, str) and torch.compiler.is_compiling()):
        custom = tensor_mechanism(mechanism, noise_structure)
    if custom is not None:
        if math.isfinite(epsilon) or head_epsilons is not None:
            asked = {"head_epsilons": head_epsilons, "noise_structure": noise_structure, "seed": seed}
            out, stats = tensor_release(
                q,
                k,
                v,
                custom,
                PrivacySpec(epsilon=epsilon, delta=delta, unit=unit, relation=relation, queries=queries),
                number,
                refused=asked | {"backend": None if backend in ("auto", "torch") else backend},
                release=released,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                clip=clip,
                clip_norm=1.0 if clip_norm is None else clip_norm,
                logit_bound=bound_of_logits(softcap, logit_bound),
                lengths=lengths,
                mask=mask,
                bias=bias,
            )
            return (out, stats) if return_privacy_stats else out
        mechanism = "gaussian"  # there is no noise to make
    terms = Terms(
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=tuple(window_size) if isinstance(window_size, list) else window_size,
        softcap=softcap,
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        relation=relation,
        queries=queries,
        clip_norm=clip_norm,
        clip=clip,
        logit_bound=logit_bound,
        mechanism=mechanism,
        noise_structure=noise_structure,
        head_epsilons=tuple(head_epsilons) if isinstance(head_epsilons, list) else head_epsilons,
        allow_infinite_heads=allow_infinite_heads,
        backend=backend,
        seed=seed,
        ledger=number,
        ledger_delta=ledger_delta,
        lengths=tuple(length for pair in lengths for length in pair),
        mask=None if mask is None else bits(mask),
    )
    if torch.compiler.is_compiling():
        if return_privacy_stats:
            return _with_stats(q, k, v, terms, bias, compute)
        return compute(q, k, v, _traced_draw(q, k, v, terms, bias), *_values(terms, bias))
    what = agreed(q, k, v, terms, bias)
    ledger_numbered(number, what.spec)
    ticket = draw(q, k, v, terms, bias)
    out = compute(q, k, v, ticket, *_values(terms, bias))
    return (out, _stats(what, ticket, terms)) if return_privacy_stats else out


def draw(q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None = None) -> Tensor:
    """Charge one release, and the ticket of its noise."""
    return _drawn(DRAWN, q, k, v, terms, bias)


def _drawn(drawn: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None) -> Tensor:
    gradients, values = torch.is_grad_enabled(), _values(terms, bias)
    return draw_release(drawn, q.detach(), k.detach(), v.detach(), 1, gradients, *values)


def _values(terms: Terms, bias: Tensor | None) -> tuple[Any, ...]:
    return terms if bias is None else (*terms, bias)


class _Exported:
    draws = 0


def _traced_draw(q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_exporting():
        # An exported program keeps no state of ours; two draws differ in their number, so they are never one.
        _Exported.draws += 1
        return _drawn(torch.full((1,), _Exported.draws), q, k, v, terms, bias)
    if tracing_checkpoint():
        # in a graph, the backward pass would draw again; the interpreter asks which draw it was
        torch._dynamo.graph_break("a release inside a checkpointed region is recomputed by the interpreter")
    return draw(q, k, v, terms, bias)


@torch.compiler.disable(reason="PrivacyStats names the line of the ledger, which each run writes anew")
def _with_stats(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None, compute: Callable[..., Tensor]
) -> tuple[Tensor, PrivacyStats]:
    what = agreed(q, k, v, terms, bias)
    ticket = draw(q, k, v, terms, bias)
    return compute(q, k, v, ticket, *_values(terms, bias)), _stats(what, ticket, terms)


def _stats(what: Agreed, ticket: Tensor, terms: Terms) -> PrivacyStats:
    priced = what.priced
    return PrivacyStats.of(
        what.spec,
        priced,
        epsilon_spent=priced.epsilon,
        backend=what.backend,
        event_id=line_of(ticket),
        secure_noise=terms.seed is None,
        head_epsilons=priced.head_epsilons,
        head_noise_scales=priced.plan.head_scale if terms.head_epsilons is not None else (),
    )
