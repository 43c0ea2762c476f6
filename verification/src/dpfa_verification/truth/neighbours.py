"""Pairs of neighbouring inputs that move attention's output as far as this verifier can find."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec

Matrix = NDArray[np.float64]


def farthest(spec: PrivacySpec, problem: AttentionProblem, norm: Norm) -> float:
    """The largest distance found between the released rows of two neighbours, over the reals.

    Logits are chosen freely within the bound: with a head dimension as large as the number of keys, queries
    and keys for any of them exist. All heads do the same.
    """
    # a row before the first key sees none, and is zeros
    blind = max(0, problem.q_len - problem.kv_len) if problem.causal else 0
    rows = (problem.q_len - blind) * problem.q_heads
    clip = problem.clip_norm or math.inf
    if spec.unit == "sequence":
        row = clip * (2 if spec.relation == "replace" else 1)
        return row * (rows if norm == "l1" else math.sqrt(rows))
    return max(_token(spec, problem, norm, key, up) for key in range(problem.kv_len) for up in range(problem.kv_len))


def _token(spec: PrivacySpec, problem: AttentionProblem, norm: Norm, changed: int, up: int) -> float:
    """Token `changed` draws all it can, with its value turned round; its own row sends `up` keys the other way."""
    bound, clip = problem.logit_bound or 0.0, problem.clip_norm or math.inf
    offset = problem.kv_len - problem.q_len
    total = 0.0
    for row in range(problem.q_len):
        seen = [key for key in range(problem.kv_len) if not problem.causal or key <= row + offset]
        if changed not in seen:
            continue
        own = spec.queries == "private" and row + offset == changed
        before = np.full(len(seen), -bound)
        after = before.copy()
        values = np.full(len(seen), clip)
        place = seen.index(changed)
        if own:
            others = [index for index in range(len(seen)) if index != place]
            # The keys that gain weight agree with the new value, those that lose it with the old one.
            for index in others[:up]:
                before[index], after[index] = bound, -bound
                values[index] = clip
            for index in others[up:]:
                before[index], after[index] = -bound, bound
                values[index] = -clip
        before[place] = after[place] = bound
        first, second = values.copy(), values.copy()
        first[place], second[place] = clip, -clip
        moved = abs(_mean(before, first) - _mean(after, second))
        total += moved if norm == "l1" else moved**2
    total *= problem.q_heads
    return total if norm == "l1" else math.sqrt(total)


def _mean(logits: Matrix, values: Matrix) -> float:
    weights = np.exp(logits)
    return float(np.dot(weights, values) / weights.sum())
