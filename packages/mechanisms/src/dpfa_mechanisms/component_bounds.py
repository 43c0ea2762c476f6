"""How far a row moves when only a record's query, only its key or only its value changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.records import Record
from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec
from dpfa_mechanisms.rounding import accumulation, clipped_norm, exponent_error, output_norm, weight_error
from dpfa_mechanisms.sensitivity import max_weight, reasons_against


@dataclass(frozen=True, kw_only=True)
class ComponentBounds(Record):
    """Bounds of one row of one head in output units, with the margin for floating point."""

    query: float
    """0 where queries are public."""
    key: float
    value: float


def turned_weight(visible_keys: int, logit_bound: float) -> float:
    """The most softmax weight that can go from some of `visible_keys` keys to the others while logits stay bounded.

    For a keys at one end and the rest at the other it is concave in a and symmetric, so half of them are the worst.

    Guarantee: tested (against every split).
    """
    n = visible_keys
    if n <= 1:
        return 0.0
    low, half = math.exp(-2.0 * logit_bound), n // 2
    return half / (half + (n - half) * low) - half * low / (half * low + (n - half))


def swung_weight(visible_keys: int, logit_bound: float) -> float:
    """The most weight that one of `visible_keys` keys gains while its logit goes from one end to the other.

    The other logits stay. Where their exponentials can sum to 1 that is the worst, and the least sum is it otherwise.

    Guarantee: tested (against a grid of the others' logits).
    """
    n = visible_keys
    if n <= 1:
        return 0.0
    low = math.exp(-logit_bound)
    others = max(1.0, (n - 1) * low)
    return 1.0 / (1.0 + others * low) - low / (low + others)


def component_bounds(spec: PrivacySpec, problem: AttentionProblem, norm: Norm, visible_keys: int) -> ComponentBounds:
    """Of a row that sees `visible_keys` keys.

    | unit | query | key | value |
    |---|---|---|---|
    | token | all its weights turn | its key's logit goes from one end to the other | twice the clip at most weight |
    | sequence | all weights turn | all weights turn | twice the clip |

    An output clip bounds all three by its diameter. Each holds for either relation.

    Guarantee: tested (never below what a search finds, and near it).
    Raises: PrivacyParameterError where there is no sensitivity.
    Source: as PRIVACY P3: of weights p and p', the row moves by sum (p - p') v, at most 2 clip_norm times what moves.
    """
    reasons = reasons_against(spec, problem, norm)
    if reasons:
        raise PrivacyParameterError("this release has no sensitivity: " + " ".join(reasons))
    whole, n = 2.0 * output_norm(problem, norm), visible_keys
    if n <= 0:
        return ComponentBounds(query=0.0, key=0.0, value=0.0)
    if problem.clip == "output":
        return ComponentBounds(query=whole, key=whole, value=whole)
    bound = math.inf if problem.logit_bound is None else problem.logit_bound
    effective = bound + exponent_error(bound) / 2.0
    weight, clip = weight_error(problem), 2.0 * clipped_norm(problem, norm)

    def moved(share: float) -> float:
        return min(whole, clip * ((share + 2.0 * weight) * (1.0 + 2.0 * weight) + accumulation(n)))

    turned = moved(turned_weight(n, effective))
    if spec.unit == "sequence":
        return ComponentBounds(query=turned, key=turned, value=whole)
    return ComponentBounds(
        query=0.0 if spec.queries == "public" else turned,
        key=moved(swung_weight(n, effective)),
        value=moved(max_weight(n, effective)),
    )
