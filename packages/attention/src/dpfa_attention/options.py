"""What the call's options mean: aliases of mechanisms, two names for one bound, and what is refused."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from dpfa_core.checks import is_real, non_negative, one_of, require
from dpfa_core.errors import NotPrivateError
from dpfa_core.plugin_names import named, parts

ALIASES = {
    "pld": ("gaussian", "pld"),
    "standard": ("gaussian", "rdp"),
    "renyi_gaussian": ("gaussian", "rdp"),
    "rényi_gaussian": ("gaussian", "rdp"),
    "laplacian": ("laplace", None),
}
"""Alias to (mechanism, accountant that prices it; None: the least valid bound)."""


STRUCTURES = ("low_rank", "sparse", "block_diagonal", "attention_aware")
"""What ``noise_structure`` may be; each is a mechanism of its own."""


def resolve(mechanism: str, noise_structure: str | None = None) -> tuple[str, str | None]:
    """The mechanism's own name and the accountant that its alias asks for.

    ``noise_structure=X`` is ``mechanism=X``, and "structured_noise" is the structure given, or low_rank. Each may
    carry parameters: "low_rank(rank=8)".

    Raises: PrivacyParameterError for an unknown structure, or one of noise that is not Gaussian.
    """
    require(isinstance(mechanism, str), "mechanism must be the name of an installed mechanism", mechanism)
    # an accent may come as one character or as two
    asked, given = parts(unicodedata.normalize("NFC", mechanism))
    structure, shape = (None, ()) if noise_structure is None else parts(noise_structure)
    if asked == "structured_noise":
        name, accountant = structure or "low_rank", None
    else:
        name, accountant = ALIASES.get(asked, (asked, None))
    if structure is None:
        return named(name, **dict(given)), accountant
    one_of("noise_structure", structure, STRUCTURES, "None is noise without structure.")
    require(
        name in ("gaussian", structure),
        f"noise_structure={structure!r} shapes Gaussian noise, so mechanism must be 'gaussian'",
        mechanism,
        "Leave out one of them.",
    )
    return named(structure, **dict(given) | dict(shape)), accountant


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
    return_attn_probs: bool,
    head_epsilons: Any = None,
    allow_infinite_heads: bool = False,
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
    require(
        not allow_infinite_heads or head_epsilons is not None,
        "allow_infinite_heads must be False without head_epsilons",
        allow_infinite_heads,
        "A list in head_epsilons says which heads have no noise: math.inf.",
    )
