"""What the call's options mean: aliases of mechanisms, two names for one bound, and what is refused."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from dpfa_core.checks import is_real, non_negative, require
from dpfa_core.errors import NotPrivateError
from dpfa_core.registry import MECHANISMS

ALIASES = {
    "pld": ("gaussian", "pld"),
    "standard": ("gaussian", "rdp"),
    "renyi_gaussian": ("gaussian", "rdp"),
    "rényi_gaussian": ("gaussian", "rdp"),
    "laplacian": ("laplace", None),
}
"""Alias to (mechanism, accountant that prices it; None: the least valid bound)."""


def resolve(mechanism: str) -> tuple[str, str | None]:
    """The mechanism's own name and the accountant that its alias asks for."""
    require(isinstance(mechanism, str), "mechanism must be the name of an installed mechanism", mechanism)
    # an accent may come as one character or as two
    name = unicodedata.normalize("NFC", mechanism)
    return ALIASES.get(name, (name, None))


def bound_of_logits(softcap: float, logit_bound: float | None) -> float | None:
    """flash-attn's ``softcap`` and our ``logit_bound`` are one number; 0 and None mean no bound."""
    non_negative("softcap", softcap, remedy="0 means no bound.")
    if not softcap:
        return logit_bound
    require(
        logit_bound is None or logit_bound == softcap,
        f"logit_bound must equal softcap={softcap}, which means the same",
        logit_bound,
        "Give one of them.",
    )
    return float(softcap)


def scale_of_logits(softmax_scale: float | None, head_dim: int) -> float:
    """1 / sqrt(head_dim) unless another scale is given."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    require(
        is_real(softmax_scale) and math.isfinite(softmax_scale),
        "softmax_scale must be None or a finite number",
        softmax_scale,
    )
    return float(softmax_scale)


def refuse_what_is_not_offered(
    *,
    dropout_p: float,
    alibi_slopes: Any,
    return_attn_probs: bool,
    noise_structure: str | None,
    head_epsilons: Any,
    allow_infinite_heads: bool,
) -> None:
    """Options of the signature that would void the guarantee, or that this version does not do.

    Raises: NotPrivateError for attention probabilities; PrivacyParameterError for the others.
    """
    if return_attn_probs:
        raise NotPrivateError(
            "return_attn_probs must be False, got True: attention probabilities are functions of the records "
            "that leave without noise; compute them apart, outside what is promised."
        )
    require(
        isinstance(dropout_p, int | float) and dropout_p == 0,
        "dropout_p must be 0 in a release",
        dropout_p,
        "Dropped weights are rescaled, which no sensitivity here covers.",
    )
    _only_none("alibi_slopes", alibi_slopes, "Biased logits are not offered by this version; leave them out.")
    installed = ", ".join(entry.name for entry in MECHANISMS.entries() if not entry.disabled) or "none"
    _only_none(
        "noise_structure",
        noise_structure,
        f"Structured noise is not offered by this version; choose a mechanism (installed: {installed}).",
    )
    _only_none(
        "head_epsilons",
        head_epsilons,
        "A budget for each head is not offered by this version; epsilon covers all heads together.",
    )
    require(
        not allow_infinite_heads,
        "allow_infinite_heads must be False",
        allow_infinite_heads,
        "Heads without noise are not offered by this version.",
    )


def _only_none(name: str, value: Any, remedy: str) -> None:
    # a tensor is named by its type: its values are nobody's business
    require(value is None, f"{name} must be None", value if isinstance(value, str) else type(value).__name__, remedy)
