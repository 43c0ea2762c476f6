"""Which parameters are clipped together, and at what: one group, one for each layer or head, or the user's own.

Noise has one standard deviation for all groups. With a threshold C_g for group g, one sample moves the whole sum
by at most sqrt(sum_g C_g^2), whatever the groups are; that stays within ``max_grad_norm``. So the noise multiplier
is that of flat clipping: (sum_g (s / C_g)^-2)^(-1/2) = s / sqrt(sum_g C_g^2), with s the noise's std.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from dpfa_core.checks import one_of, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_training.adaptive_clipping import QuantileClipping
from dpfa_training.clipping import PIECE, Clipping, Cut
from dpfa_training.heads import head_cuts

Given = tuple[tuple[str, float], ...]
ClippingChoice = str | Given | QuantileClipping
"""How gradients are clipped, as a plan holds it; ``checked_choice`` makes it from what a user gives."""

NAMED = ("flat", "per_layer", "per_head", "automatic")

SLACK = Fraction(1, 2**40)
"""Thresholds whose squares add up to this share more than they may are lowered; a larger excess is refused."""


def checked_choice(clipping: Any) -> ClippingChoice:
    """`clipping` as ``make_private`` takes it: a name, {parameter or prefix: threshold}, or a QuantileClipping.

    Raises: PrivacyParameterError.
    """
    if isinstance(clipping, QuantileClipping):
        return clipping
    if isinstance(clipping, Mapping) and clipping.get("rule") == "quantile":  # from JSON
        return QuantileClipping.from_json(dict(clipping))
    if isinstance(clipping, list | tuple):  # pairs, as a plan and its JSON hold them
        good = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in clipping)
        require(good, "clipping must be pairs of a name and a threshold", clipping)
        clipping = dict(clipping)
    if isinstance(clipping, Mapping):
        require(bool(clipping), "clipping must name at least one group of parameters", clipping)
        for name, threshold in clipping.items():
            require(isinstance(name, str), "the names in clipping must be strings", name)
            positive(f"the clip threshold of {name!r}", threshold)
        return tuple(sorted((name, float(threshold)) for name, threshold in clipping.items()))
    remedy = "Or give a mapping {parameter or prefix: threshold}, or a QuantileClipping."
    require(isinstance(clipping, str), "clipping must be a name, a mapping or a QuantileClipping", clipping)
    one_of("clipping", clipping, NAMED, remedy)
    return str(clipping)


def clipping_for(choice: ClippingChoice, max_grad_norm: float, module: nn.Module) -> Clipping:
    """Thresholds and groups of the trainable parameters of `module`.

    Guarantee: proved (in exact arithmetic: the thresholds' squares add up to at most max_grad_norm squared).
    Raises: PrivacyParameterError for a parameter without a threshold, a name without a parameter, thresholds that
        exceed `max_grad_norm` together, and "per_head" without attention layers that tell their head count.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    cuts: dict[str, Cut] = {}
    if isinstance(choice, tuple):
        group_of = _nearest(names, [prefix for prefix, _ in choice])
        thresholds = _fitting([threshold for _, threshold in choice], max_grad_norm)
    elif choice in ("per_layer", "per_head"):
        labels = {name: name.rpartition(".")[0] for name in names}
        if choice == "per_head":
            cuts, of_pieces = head_cuts(module, names)
            labels = {name: label for name, label in labels.items() if name not in cuts} | of_pieces
        order = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
        group_of = {name: order[label] for name, label in labels.items()}
        thresholds = _fitting([max_grad_norm / math.sqrt(len(order))] * len(order), max_grad_norm)
    elif choice == "automatic":
        return Clipping((max_grad_norm,), rule="automatic")
    else:
        return Clipping.flat(max_grad_norm)
    require(not (cuts and any(PIECE in name for name in names)), f"parameter names must not contain {PIECE!r}", names)
    return Clipping(thresholds, group_of, cuts=cuts)


def _nearest(names: list[str], prefixes: list[str]) -> dict[str, int]:
    """Each parameter's longest prefix; the prefix "" stands for all that no other names."""
    group_of = {}
    for name in names:
        fitting = [prefix for prefix in prefixes if not prefix or name == prefix or name.startswith(f"{prefix}.")]
        if not fitting:
            raise PrivacyParameterError(
                f"clipping must give a threshold to every trainable parameter, got none for {name!r}; name it or a "
                'prefix of it ("" stands for all others), or freeze it.'
            )
        group_of[name] = prefixes.index(max(fitting, key=len))
    unused = [prefix for index, prefix in enumerate(prefixes) if index not in group_of.values()]
    if unused:
        raise PrivacyParameterError(
            f"each name in clipping must lead to a trainable parameter of its own, got {unused[0]!r}, which leads to "
            "none; remove it, so that its threshold does not raise the noise."
        )
    return group_of


def _fitting(thresholds: list[float], max_grad_norm: float) -> tuple[float, ...]:
    """The thresholds, lowered by a rounding error if that is what they exceed `max_grad_norm` by."""
    if math.isinf(max_grad_norm):
        return tuple(thresholds)

    def square(values: list[float]) -> Fraction:
        return sum((Fraction(value) ** 2 for value in values), Fraction(0))

    limit = Fraction(max_grad_norm) ** 2
    if limit < square(thresholds) <= limit * (1 + SLACK):
        thresholds = [threshold * float(1 - SLACK) for threshold in thresholds]
    if square(thresholds) > limit:
        needed = math.hypot(*thresholds)
        raise PrivacyParameterError(
            f"the thresholds of all groups must stay within max_grad_norm={max_grad_norm:g} together, got "
            f"sqrt(sum of squares)={needed:.9g}; noise is calibrated to max_grad_norm, so raise it or lower them."
        )
    return tuple(thresholds)
