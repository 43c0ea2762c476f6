"""What a module refuses when it is built, because no call could use it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from dpfa_core.checks import one_of, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.allocation import importance_based
from dpfa_mechanisms.sensitivity import reasons_against

if TYPE_CHECKING:
    from dpfa_attention.module import DPFlashAttention


def one_clip(max_grad_norm: float | None, clip_norm: float | None) -> float | None:
    """The clip, which has two names."""
    require(
        None in (max_grad_norm, clip_norm) or max_grad_norm == clip_norm,
        f"clip_norm must equal max_grad_norm={max_grad_norm}, which means the same",
        clip_norm,
        "Give one of them.",
    )
    return max_grad_norm if clip_norm is None else clip_norm


def shared_by_importance(
    scores: Sequence[float] | None,
    *,
    strategy: str | None,
    head_epsilons: tuple[float, ...] | None,
    epsilon: float,
    delta: float,
    heads: int,
    mechanism: str,
) -> tuple[float, ...] | None:
    """`head_epsilons` in the ratios that serve the important heads best; the list itself where there are no scores."""
    require(
        scores is None or strategy == "importance_based",
        'head_importances need strategy="importance_based"',
        strategy,
    )
    if strategy is None:
        return head_epsilons
    require(
        (scores is None) != (head_epsilons is None),
        'strategy="importance_based" needs head_importances or head_epsilons, one of them',
        "both" if scores else "neither",
        "Importances are public numbers > 0; a list of epsilons has been shared out already.",
    )
    if scores is None:
        return head_epsilons
    require(math.isfinite(epsilon), "head_importances share a finite epsilon", epsilon)
    noise: Literal["gaussian", "laplace"] = "laplace" if mechanism.startswith("laplace") else "gaussian"
    return importance_based(scores, epsilon, delta, heads=heads, mechanism=noise).part_epsilons


def refuse_what_no_call_can_use(module: DPFlashAttention) -> None:
    """Raises: PrivacyParameterError."""
    if module.setting == "training":
        require(
            module.clip_norm is None and module.logit_bound is None and module.head_epsilons is None,
            'clip_norm, max_grad_norm, logit_bound and head_epsilons must be None in setting="training"',
            "another value",
            "Attention is exact there; make_private takes max_grad_norm.",
        )
        return
    spec = PrivacySpec(
        epsilon=module.epsilon,
        delta=module.delta,
        unit=module.unit,
        relation=module.relation,
        queries=module.queries,
    )
    one_of("unit", module.unit, ("sequence", "token"), 'Examples and users are units of setting="training".')
    require(
        module.dropout == 0,
        'dropout must be 0 in setting="release"',
        module.dropout,
        "Dropped weights are rescaled, which no sensitivity here covers.",
    )
    refuse_without_sensitivity(
        spec,
        private=not math.isinf(module.epsilon) or module.head_epsilons is not None,
        problem=one_token(
            module.num_heads,
            module.head_dim,
            window=(module.window_size[0], module.window_size[1]),
            clip=module.clip,
            clip_norm=module.clip_norm,
            logit_bound=module.logit_bound,
        ),
    )
    _refuse_heads(module.head_epsilons, module.num_heads, allow_infinite=module.allow_infinite_heads)


def one_token(heads: int, head_dim: int, **terms: Any) -> AttentionProblem:
    """The least that a release with these `terms` can be asked for."""
    return AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=heads, kv_heads=heads, head_dim=head_dim, **terms)


def refuse_without_sensitivity(spec: PrivacySpec, problem: AttentionProblem, *, private: bool) -> None:
    """Raises: PrivacyParameterError where no call with these terms could have a bound."""
    if not private:
        return
    clip_norm = 1.0 if problem.clip_norm is None else problem.clip_norm
    reasons = reasons_against(spec, dataclasses.replace(problem, clip_norm=clip_norm), "l2")
    if reasons:
        raise PrivacyParameterError("this release has no sensitivity: " + " ".join(reasons))


def _refuse_heads(epsilons: Any, heads: int, *, allow_infinite: bool) -> None:
    require(
        epsilons is None or len(epsilons) == heads,
        f"head_epsilons must hold {heads} numbers, one for each head",
        epsilons,
    )
    require(
        epsilons is None or allow_infinite or math.inf not in epsilons,
        "head_epsilons must be finite unless allow_infinite_heads=True, because a head without noise makes the whole "
        "release not private",
        epsilons,
    )
