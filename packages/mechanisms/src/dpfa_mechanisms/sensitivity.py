"""How far one record moves the rows of one attention release (PRIVACY P2, P3, P10).

In a row with n visible keys and logits within +-B, one softmax weight is at most
1 / (1 + (n-1) exp(-2B)). Replacing one key and its value moves such a row by at most twice that, times the
clip norm; the record's own row moves further, because with its query every logit changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec, Reasons, Sensitivity
from dpfa_core.visibility import lengths, rows_that_see
from dpfa_mechanisms.rounding import (
    accumulation,
    clipped_norm,
    exponent_error,
    output_norm,
    weight_error,
)
from dpfa_mechanisms.visible import Floats, Visible

if TYPE_CHECKING:
    from dpfa_mechanisms.explain import Explanation

SUM_MARGIN = 1.0 + 2.0**-30
"""Covers the float64 sums of this module."""


def max_weight(visible_keys: int, logit_bound: float) -> float:
    """The largest softmax weight one key can have in a row with `visible_keys` keys and bounded logits.

    Guarantee: tested (attained). Source: PRIVACY P3.
    """
    if visible_keys <= 0:
        return 0.0
    return 1.0 / (1.0 + (visible_keys - 1) * math.exp(-2.0 * logit_bound))


def own_row_factor(visible_keys: int, logit_bound: float) -> float:
    """Half the largest move, per clip norm, of the row whose query, key and value are all replaced.

    At the extremum a keys go up and the other n-1-a go down; what stays is convex in a, so an even split
    is the worst one.

    Guarantee: tested (attained; against every split). Source: PRIVACY P3.
    """
    n = visible_keys
    if n <= 0:
        return 0.0
    low = math.exp(-2.0 * logit_bound)

    def stays(keys: int) -> float:
        return keys * low / (keys * low + (n - keys))

    return 1.0 - stays((n - 1) // 2) - stays(n // 2)


def reasons_against(spec: PrivacySpec, problem: AttentionProblem, norm: Norm) -> Reasons:
    """Why this package has no proved bound for the release; empty means that it has one."""
    reasons = []
    if norm not in ("l1", "l2", "whitened_l2"):
        reasons.append(f"sensitivities are known in the norms l1, l2 and whitened_l2, got {norm!r}.")
    if spec.unit not in ("sequence", "token"):
        reasons.append(
            f'an attention release protects unit="sequence" or "token", got {spec.unit!r}; '
            "examples and users are units of training."
        )
    if problem.clip_norm is None:
        reasons.append("a release needs a finite clip_norm, got None; without one a row can move without limit.")
    if spec.unit == "token":
        if problem.clip != "value":
            reasons.append(
                f'unit="token" needs clip="value", got {problem.clip!r}; '
                "an output clip lets every row that sees the token move by twice the clip norm."
            )
        if problem.logit_bound is None:
            reasons.append('unit="token" needs a logit_bound, got None; without one a single key can take all weight.')
    return tuple(reasons)


def sensitivity(spec: PrivacySpec, problem: AttentionProblem, norm: Norm = "l2") -> Sensitivity:
    """The largest distance between two releases whose inputs differ in one record.

    Guarantee: tested (records replaced by brute force never exceed it; extremal ones reach it).
    Args: `norm` is the one the mechanism clips in. In "whitened_l2" rows are measured after the mechanism's
    whitening; the margin for floating point is then the one of unit scales, and a mechanism whose whitening
    stretches some directions more than others adds what that does to rounding errors.
    Returns: value and rows in output units, with the margin for floating point; `naive` is what holds
    without looking at the softmax.
    Raises: PrivacyParameterError with every reason against.
    Source: PRIVACY P3; the row bounds are attained.
    """
    reasons = reasons_against(spec, problem, norm)
    if reasons:
        raise PrivacyParameterError("this release has no sensitivity: " + " ".join(reasons))
    if spec.unit == "sequence":
        return _sequence(problem, norm, 1.0 if spec.relation == "add_or_remove" else 2.0)
    return _token(problem, norm, "public" if spec.queries == "public" else "private")


def explain(spec: PrivacySpec, problem: AttentionProblem, norm: Norm = "l2") -> Explanation:
    """Why ``sensitivity`` is what it is; see ``dpfa_mechanisms.explain``."""
    # that module takes this one apart, so it is imported when it is asked for
    from dpfa_mechanisms.explain import explain as take_apart

    return take_apart(spec, problem, norm)


def moving_rows(problem: AttentionProblem, batch_row: int) -> int:
    """How many rows of one head a record of this batch row can move: a row that sees no key is always zeros."""
    if problem.mask is None:
        return rows_that_see(problem, batch_row)
    return int(np.count_nonzero(Visible.of(problem, batch_row).counts))


def _rows(problem: AttentionProblem) -> int:
    """Rows that can move times heads, of the batch row that has most of them: R."""
    return max(moving_rows(problem, row) for row in different_rows(problem)) * problem.q_heads


def _whole(row: float, rows: int, norm: Norm) -> float:
    return row * (rows if norm == "l1" else math.sqrt(rows)) * SUM_MARGIN


def _sequence(problem: AttentionProblem, norm: Norm, moves: float) -> Sensitivity:
    row = moves * output_norm(problem, norm)
    value = _whole(row, _rows(problem), norm)
    return Sensitivity(
        norm=norm,
        value=value,
        naive=value,
        item="P3.sequence",
        row_bound=(0.0,) + (row * SUM_MARGIN,) * problem.kv_len,
    )


@lru_cache(maxsize=32)
def row_bounds(
    problem: AttentionProblem, norm: Norm, queries: Literal["public", "private"]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How far one token moves one row of one head, indexed by the number n of keys that the row sees.

    Guarantee: tested, with the margin for floating point.
    Returns: (a row that sees the token's key, the token's own row), each of length kv_len + 1 and in output
    units. With public queries the own row is like any other.
    Source: PRIVACY P3.
    """
    bound = math.inf if problem.logit_bound is None else problem.logit_bound
    effective = bound + exponent_error(bound) / 2
    weight, clip = weight_error(problem), 2.0 * clipped_norm(problem, norm)
    whole_row = 2.0 * output_norm(problem, norm)

    def seen(n: int) -> float:
        grown = max_weight(n, effective) * (1.0 + 2.0 * weight) ** 2
        return min(whole_row, clip * (grown + accumulation(n))) if n else 0.0

    def own(n: int) -> float:
        grown = (own_row_factor(n, effective) + 2.0 * weight) * (1.0 + 2.0 * weight)
        return min(whole_row, clip * (grown + accumulation(n))) if n else 0.0

    others = tuple(seen(n) for n in range(problem.kv_len + 1))
    return others, tuple(own(n) for n in range(problem.kv_len + 1)) if queries == "private" else others


def token_loads(
    visible: Visible, seen: Floats, own: Floats, queries: Literal["public", "private"] = "private"
) -> tuple[Floats, Floats]:
    """What each token adds up to, if row i costs ``seen[i]`` to a key it sees and ``own[i]`` to its own token.

    A private query changes its whole row, whether or not the row sees the token's key; a public one changes
    nothing, and then the row costs its token what it costs any key it sees.

    Returns: (kv_len,) for the tokens that have a key, and (rows,) for those that are a query alone, because
    their row lies before the first key.
    """
    key = visible.own_key
    loads = visible.over_rows(seen)
    here = key >= 0
    if queries == "private":
        np.add.at(loads, key[here], own[here] - np.where(visible.sees_itself, seen, 0.0)[here])
        return loads, own[~here]
    return loads, np.zeros(int((~here).sum()))


@dataclass(frozen=True)
class WorstToken:
    """The token with the largest load, and where it stands."""

    load: float
    batch_row: int
    key: int | None
    """None for a token that is a query alone."""
    query: int | None
    """The token's own row; None for a token that is a key alone."""


def worst_token(
    problem: AttentionProblem, seen: Floats, own: Floats, queries: Literal["public", "private"] = "private"
) -> WorstToken:
    """The first token with the largest load over all batch rows.

    Args: costs of one row of one head, indexed by the number of keys it sees: (kv_len + 1,).
    """
    worst = WorstToken(0.0, 0, 0, None)
    for batch_row in different_rows(problem):
        visible = Visible.of(problem, batch_row)
        loads, alone = token_loads(visible, seen[visible.counts], own[visible.counts], queries)
        if loads.size and loads.max() > worst.load:
            key = int(loads.argmax())
            row = key - (visible.kv_len - visible.q_len)
            worst = WorstToken(float(loads.max()), batch_row, key, row if 0 <= row < visible.q_len else None)
        if alone.size and alone.max() > worst.load:
            worst = WorstToken(float(alone.max()), batch_row, None, int(alone.argmax()))
    return worst


def _token(problem: AttentionProblem, norm: Norm, queries: Literal["public", "private"]) -> Sensitivity:
    seen, own = row_bounds(problem, norm, queries)
    power = 1 if norm == "l1" else 2
    worst = worst_token(problem, np.array(seen) ** power, np.array(own) ** power, queries)
    whole_row = 2.0 * output_norm(problem, norm)
    return Sensitivity(
        norm=norm,
        value=(problem.q_heads * worst.load) ** (1.0 / power) * SUM_MARGIN,
        naive=_whole(whole_row, _rows(problem), norm),
        item=f"P3.token.{queries}",
        row_bound=tuple(row * SUM_MARGIN for row in own),
        worst_key=worst.key or 0,
    )


def heaviest_token(
    problem: AttentionProblem, seen: Floats, own: Floats, queries: Literal["public", "private"] = "private"
) -> tuple[float, int]:
    """The largest load of one token over all batch rows, and the first key that has it (0 for a query alone).

    Args: costs of one row of one head, indexed by the number of keys it sees: (kv_len + 1,).
    """
    worst = worst_token(problem, seen, own, queries)
    return worst.load, worst.key or 0


def different_rows(problem: AttentionProblem) -> list[int]:
    """One batch row of each pair of lengths: rows of equal lengths see alike."""
    return sorted({lengths(problem, row): row for row in reversed(range(len(problem.lengths) or 1))}.values())
