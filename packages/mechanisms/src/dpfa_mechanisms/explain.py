"""Why a sensitivity is what it is: which token is the worst, what its rows add, and what would lower it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

import numpy as np

from dpfa_core.records import Record
from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec
from dpfa_mechanisms.sensitivity import WorstToken, moving_rows, row_bounds, sensitivity, worst_token
from dpfa_mechanisms.visible import Floats, Integers, Visible

SHOWN = 1e-3
"""A smaller share of the bound is not worth a sentence."""

ALIKE = 1.5
"""Loads that differ by less than this factor count as the same."""


@dataclass(frozen=True, kw_only=True)
class RowProfile(Record):
    """The rows of the worst batch row that see one number of keys, and how far a record moves each of them."""

    visible_keys: int
    rows: int
    """Query rows, counted once for all heads."""
    if_seen: float
    """Bound of one row of one head that sees the record's key, in output units."""
    if_own: float
    """Bound of one row of one head that is the record's own."""


@dataclass(frozen=True, kw_only=True)
class Explanation(Record):
    """A sensitivity taken apart; all bounds in output units, with the margin for floating point."""

    item: str
    """The theorem: an item of PRIVACY P3."""
    norm: Norm
    tight: float
    """What the noise is scaled by."""
    naive: float
    """What holds without looking at the softmax: every row moves by its whole diameter."""
    saving: float
    """1 - tight / naive."""
    rows: tuple[RowProfile, ...]
    worst_batch_row: int
    worst_key: int | None
    """None for the sequence unit, and for a token that is a query alone."""
    worst_query: int | None
    """The worst token's own row; None for the sequence unit, and for a token that is a key alone."""
    own_share: float
    """The part of the worst token's load (sum of squares, in "l1" of bounds) that its own row makes."""
    sentences: tuple[str, ...]


def explain(spec: PrivacySpec, problem: AttentionProblem, norm: Norm = "l2") -> Explanation:
    """Take the sensitivity of one release apart.

    Guarantee: tested (the profile of the worst batch row adds up to the bound again).
    Raises: PrivacyParameterError where there is no sensitivity.
    Source: PRIVACY P3.
    """
    bound = sensitivity(spec, problem, norm)
    power = 1 if norm == "l1" else 2
    saving = max(0.0, 1.0 - bound.value / bound.naive) if bound.naive > 0 else 0.0
    if spec.unit == "sequence":
        longest = max(range(len(problem.lengths) or 1), key=lambda row: moving_rows(problem, row))
        worst = WorstToken(0.0, longest, None, None)
        seen = own = bound.row_bound
        own_share, sentences = 0.0, _of_sequence(spec, problem, longest)
    else:
        queries: Literal["public", "private"] = "public" if spec.queries == "public" else "private"
        seen, own = row_bounds(problem, norm, queries)
        seen_cost, own_cost = np.array(seen) ** power, np.array(own) ** power
        worst = worst_token(problem, seen_cost, own_cost, queries)
        visible = Visible.of(problem, worst.batch_row)
        own_share = _own_share(worst, visible.counts, visible.sees_itself, seen_cost, own_cost, queries)
        sentences = _of_token(spec, problem, norm, worst, visible, seen_cost, own_share)
    counts = Visible.of(problem, worst.batch_row).counts
    kinds, many = np.unique(counts, return_counts=True)
    return Explanation(
        item=bound.item,
        norm=norm,
        tight=bound.value,
        naive=bound.naive,
        saving=saving,
        rows=tuple(
            RowProfile(visible_keys=n, rows=rows, if_seen=seen[n], if_own=own[n])
            for n, rows in zip(kinds.tolist(), many.tolist(), strict=True)
        ),
        worst_batch_row=worst.batch_row,
        worst_key=worst.key,
        worst_query=worst.query,
        own_share=own_share,
        sentences=(*sentences, _saved(bound.value, bound.naive), *_floating_point(spec, problem, norm, bound.value)),
    )


def _own_share(
    worst: WorstToken,
    counts: Integers,
    sees_itself: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    seen: Floats,
    own: Floats,
    queries: Literal["public", "private"],
) -> float:
    if worst.query is None or worst.load <= 0:
        return 0.0
    n = counts[worst.query]
    if queries == "private":
        cost = own[n]
    else:
        cost = seen[n] if sees_itself[worst.query] else 0.0
    return min(1.0, float(cost) / worst.load)


def _of_sequence(spec: PrivacySpec, problem: AttentionProblem, longest: int) -> tuple[str, ...]:
    rows = moving_rows(problem, longest)
    moves = "its clip norm" if spec.relation == "add_or_remove" else "twice its clip norm"
    where = f"batch row {longest}, which has most of them," if problem.lengths else "any batch row"
    extent = f"{_count(rows, 'row')} in {_count(problem.q_heads, 'head')}"
    return (
        f"A whole sequence is one record, so every one of its {extent} that sees a key can move by {moves}: {where} "
        "sets the bound.",
        "Looking at the softmax buys nothing here: all keys and values change together.",
        'A smaller clip_norm, fewer released rows or heads, or unit="token" would lower it.',
    )


def _of_token(
    spec: PrivacySpec,
    problem: AttentionProblem,
    norm: Norm,
    worst: WorstToken,
    visible: Visible,
    seen: Floats,
    own_share: float,
) -> tuple[str, ...]:
    """Args: `seen`, the load of a row that sees the token, indexed by its number of keys."""
    if worst.load <= 0:
        return ("No query sees a key, so nothing that is released depends on a token.",)
    if worst.key is None:
        n = int(visible.counts[worst.query])
        others = np.zeros(visible.q_len, dtype=bool)
        why = (
            f"The worst token is the query of row {worst.query} in batch row {worst.batch_row}: it has no key, and "
            f"its own row, which sees {_count(n, 'key')}, moves most."
        )
    else:
        others = visible.over_keys(np.eye(1, visible.kv_len, worst.key)[0]) > 0.5
        why = _why_worst(worst, visible, np.asarray(visible.counts[others]))
    moved = others.copy()
    if worst.query is not None and spec.queries != "public":
        others[worst.query], moved[worst.query] = False, True
    return (
        why,
        _what_dominates(np.asarray(visible.counts[others]), seen, own_share),
        _remedies(spec, problem, norm, visible, np.asarray(visible.counts[moved])),
    )


def _why_worst(worst: WorstToken, visible: Visible, sees: Integers) -> str:
    place = f"The worst key is {worst.key} of {visible.kv_len} in batch row {worst.batch_row}"
    if not sees.size:
        return f"{place}: no row sees it, but its own row moves with its query."
    seen_by = visible.over_rows(np.ones(visible.q_len)).max()
    reach = "as many as any key has" if sees.size >= seen_by else f"though another key is seen by {int(seen_by)}"
    few, many = int(sees.min()), int(sees.max())
    keys = f"{few if few == many else f'{few} to {many}'} visible keys"
    rows = "1 row sees it" if sees.size == 1 else f"{sees.size} rows see it"
    return (
        f"{place}: {rows}, {reach}, with {keys} each; the fewer keys a row sees, the more weight one of them can have."
    )


def _what_dominates(others: Integers, seen: Floats, own_share: float) -> str:
    if own_share >= 0.5:
        return (
            f"What dominates is its own row, with {own_share:.0%} of the load: "
            "there everything can change that the record holds."
        )
    loads = np.sort(seen[others])[::-1]
    if loads[0] <= ALIKE * loads[-1]:
        return f"What dominates is how many rows see the token: {others.size}, all of about the same load."
    half = int(np.searchsorted(np.cumsum(loads), loads.sum() / 2.0)) + 1
    most = int(np.sort(others)[half - 1])
    return (
        f"What dominates is the few keys of some rows: {half} of the {_count(others.size, 'row')} that see the "
        f"token, those with at most {_count(most, 'visible key')}, make {loads[:half].sum() / loads.sum():.0%} of "
        "what these rows add."
    )


def _remedies(spec: PrivacySpec, problem: AttentionProblem, norm: Norm, visible: Visible, moved: Integers) -> str:
    remedies = [f"a smaller logit_bound (it is {problem.logit_bound:g})", "a smaller clip_norm"]
    fewest = int(moved.min())
    if fewest < int(visible.counts.max()):
        remedies.append(
            f"not releasing the rows that see the fewest keys ({_count(fewest, 'key')}), or letting them see more"
        )
    if spec.queries != "public":
        public = dataclasses.replace(spec, queries="public")
        private_value, public_value = (sensitivity(each, problem, norm).value for each in (spec, public))
        if public_value < private_value * (1.0 - SHOWN):
            remedies.append(f'queries="public" ({_up(public_value)}), if the queries hold no part of a record')
    return f"What would lower it: {'; '.join(remedies)}."


def _saved(tight: float, naive: float) -> str:
    if tight <= 0:
        return "The sensitivity is 0."
    if tight >= naive * (1.0 - 1e-9):
        return f"The bound is the naive one, {_up(naive)}."
    return f"The bound is {_up(tight)} where the naive one is {_up(naive)}: {naive / tight:.3g} times less noise."


def _floating_point(spec: PrivacySpec, problem: AttentionProblem, norm: Norm, value: float) -> tuple[str, ...]:
    if problem.dtype == "float32" or value <= 0:
        return ()
    share = 1.0 - sensitivity(spec, dataclasses.replace(problem, dtype="float32"), norm).value / value
    if share < SHOWN:
        return ()
    return (f"Rounding to {problem.dtype} makes {share:.1%} of the bound; float32 would save it.",)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _up(value: float) -> str:
    """Four digits, never below the value."""
    return f"{Decimal(value).normalize(Context(prec=4, rounding=ROUND_CEILING)):f}" if value else "0"
