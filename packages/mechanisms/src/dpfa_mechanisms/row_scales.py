"""Which rows take how much noise: the least total for the privacy of every token (PRIVACY P5)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from dpfa_core.spec import AttentionProblem
from dpfa_core.visibility import lengths
from dpfa_mechanisms.sensitivity import SUM_MARGIN, different_rows, row_bounds, worst_token
from dpfa_mechanisms.visible import Floats, Visible

GAP = 1e-7
"""A plan this close to the best one, as a share of its energy, is not improved any further."""

ROUNDS = 6
"""Most restarts of the solver."""

MATRIX = 1 << 22
"""Entries of a mask that are held as numbers while the solver runs."""

UNSEEN = 2.0**-60
"""Scale of the rows that see no key: their output is zero whatever the data are."""

PRODUCT = 1.0 + 2.0**-23
"""Covers the float32 product of a head's and a row's scale in a backend."""


@dataclass(frozen=True)
class RowScales:
    """Noise stds of one head's rows, indexed by the number of visible keys, up to a common factor."""

    row_scale: tuple[float, ...]
    """(kv_len + 1,), float32 numbers, the largest is 1."""
    move: float
    """How far a record moves one head's rows, each measured in its own row_scale; rounded up."""
    uniform: float
    """The same for a row_scale of 1 everywhere."""
    gap: float
    """An upper bound of (energy - least energy) / least energy."""


@lru_cache(maxsize=32)
def row_scales(problem: AttentionProblem, queries: Literal["public", "private"]) -> RowScales:
    """Minimise the noise energy of all rows while no token moves them by more than one std in all.

    With weights ``w_n = 1 / row_scale_n**2`` the energy is ``sum_n c_n / w_n``, c_n rows seeing n keys, and each
    token j asks for ``load_j(w) = sum_i D_ij**2 w_(n_i) <= 1``: convex. Prices t_j >= 0 of the tokens, with sum
    1, make prices ``a_n = sum_j t_j (sum of D_ij**2 over the rows with n keys)`` of the rows, and these the
    weights ``w_n = sqrt(c_n / a_n)``. Scaled down until no load exceeds 1 the weights have the energy
    ``G max_j load_j``, with ``G = sum_n sqrt(c_n a_n)``; none have less than ``G**2``. Both agree at the best
    prices.

    Guarantee: tested (loads by brute force; the gap against perturbed weights and a closed form). Only `gap`
    depends on the solver: whatever it returns, `move` is summed over all tokens afterwards.
    Source: PRIVACY P5; Boyd & Vandenberghe 2004, section 5.5.
    """
    seen, own = (np.array(bounds) ** 2 for bounds in row_bounds(problem, "l2", queries))
    unit = max(float(seen.max()), float(own.max()))
    alike = Counter(lengths(problem, row) for row in range(problem.batch))
    rows, parts = np.zeros(problem.kv_len + 1), []
    for batch_row in different_rows(problem):
        visible = Visible.of(problem, batch_row)
        np.add.at(rows, visible.counts, alike[lengths(problem, batch_row)])
        parts.append(_BatchRow(visible, seen / unit, own / unit, queries))
    rows[0] = 0.0
    uniform = worst_token(problem, seen, own, queries).load
    if not rows.any():
        even = (1.0,) * len(rows)
        return RowScales(even, math.sqrt(uniform) * SUM_MARGIN, math.sqrt(uniform) * SUM_MARGIN, 0.0)

    weights, least = _solve(parts, rows)
    scale = np.where(rows > 0, 1.0 / np.sqrt(weights), 0.0)
    # numbers of keys that no row has get the largest scale
    scale = np.maximum(np.where(rows > 0, scale / scale.max(), 1.0), UNSEEN)
    scale[0] = UNSEEN
    scale = scale.astype(np.float32).astype(np.float64)
    load = worst_token(problem, seen / scale**2, own / scale**2, queries).load
    energy = float((rows * scale**2).sum()) * load
    if not energy <= float(rows.sum()) * uniform:
        scale, load, energy = np.ones(len(rows)), uniform, float(rows.sum()) * uniform
    return RowScales(
        tuple(scale.tolist()),
        math.sqrt(load) * SUM_MARGIN * PRODUCT,
        math.sqrt(uniform) * SUM_MARGIN,
        max(0.0, energy / (least * unit) - 1.0),
    )


class _BatchRow:
    """The loads of the tokens of one batch row as a linear map of the weights, and its transpose.

    ``sensitivity.token_loads`` is the same map; here nothing is looked up again in every step of a solver.
    """

    def __init__(self, visible: Visible, seen: Floats, own: Floats, queries: Literal["public", "private"]) -> None:
        self.counts, key = visible.counts, visible.own_key
        self.keys = visible.kv_len
        here = key >= 0
        private = queries == "private"
        self.seen = seen[self.counts]
        # what a row adds for its own token beyond what it adds for each key that it sees
        extra = own[self.counts] - np.where(visible.sees_itself, self.seen, 0.0)
        self.own_rows = np.flatnonzero(here) if private else np.zeros(0, dtype=np.int64)
        self.own_keys, self.extra = key[self.own_rows], extra[self.own_rows]
        self.alone_rows = np.flatnonzero(~here) if private else np.zeros(0, dtype=np.int64)
        self.alone = own[self.counts[self.alone_rows]]
        self.visible = visible
        # a matrix of bits is turned into numbers for every product, unless there is room to do it once
        bits = visible.matrix
        self.matrix = bits.astype(np.float64) if bits is not None and bits.size <= MATRIX else None
        self.tokens = self.keys + len(self.alone_rows)

    def loads(self, weights: Floats) -> Floats:
        """(tokens,): those with a key, then those that are a query alone."""
        by_row = weights[self.counts]
        costs = self.seen * by_row
        loads: Floats = self.visible.over_rows(costs) if self.matrix is None else costs @ self.matrix
        loads[self.own_keys] += self.extra * by_row[self.own_rows]
        return np.concatenate([loads, self.alone * by_row[self.alone_rows]])

    def prices(self, tokens: Floats) -> Floats:
        """(kv_len + 1 of the problem,): what one unit of each weight adds to the loads, at the tokens' prices."""
        keys = tokens[: self.keys]
        seen_by = self.visible.over_keys(keys) if self.matrix is None else self.matrix @ keys
        by_row: Floats = self.seen * seen_by
        by_row[self.own_rows] += self.extra * keys[self.own_keys]
        by_row[self.alone_rows] += self.alone * tokens[self.keys :]
        return by_row


def _solve(parts: list[_BatchRow], rows: Floats) -> tuple[Floats, float]:
    """(weights, a lower bound of the least energy); weights of numbers of keys that no row has are 1."""
    ends = np.cumsum([part.tokens for part in parts])

    def of_rows(tokens: Floats) -> Floats:
        prices = np.zeros(len(rows))
        for part, own in zip(parts, np.split(tokens, ends[:-1]), strict=True):
            prices += np.bincount(part.counts, part.prices(own), len(rows))
        # a row whose tokens all have the price 0 would take any weight
        return np.asarray(np.maximum(prices, 1e-30 * prices.max() + 1e-200), dtype=np.float64)

    def weights_of(prices: Floats) -> Floats:
        weights: Floats = np.where(rows > 0, np.sqrt(np.where(rows > 0, rows, 1.0) / prices), 1.0)
        return weights

    def loads_of(weights: Floats) -> Floats:
        return np.concatenate([part.loads(np.where(rows > 0, weights, 0.0)) for part in parts])

    def dual(tokens: Floats) -> tuple[float, Floats]:
        """The dual function turned round, so that it is minimised; prices of any sum."""
        prices = of_rows(tokens)
        return float(tokens.sum() - 2.0 * np.sqrt(rows * prices).sum()), 1.0 - loads_of(weights_of(prices))

    tokens = np.full(int(ends[-1]), 1.0 / ends[-1])
    best, least, smallest = np.ones(len(rows)), 0.0, math.inf
    for _ in range(ROUNDS):
        prices = of_rows(tokens)
        total = float(np.sqrt(rows * prices).sum())
        weights = weights_of(prices)
        loads = loads_of(weights)
        least = max(least, total**2)
        if total * loads.max() < smallest:
            best, smallest = weights, total * float(loads.max())
        if smallest <= least * (1.0 + GAP):
            break
        found = minimize(
            dual,
            tokens * total**2,
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, None)] * len(tokens),
            options={"maxiter": 400, "maxfun": 600, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-9},
        )
        # a token at the price 0 may have to come back: its load says how much it is missed
        tokens = found.x / found.x.sum() if found.x.sum() > 0 else tokens
        missed = np.maximum(loads_of(weights_of(of_rows(tokens))), 0.0)
        tokens = tokens * missed + 1e-12 * missed.max() / len(tokens)
        tokens /= tokens.sum()
    return best, least
