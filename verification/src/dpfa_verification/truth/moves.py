"""How far one record moves attention's rows, each measured in its own noise: row by row, key by key.

Over the reals, from the formulas for single rows; nothing is shared with the package that is examined.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec

Bits = NDArray[np.bool_]


def sees(problem: AttentionProblem, batch_row: int) -> Bits:
    """bool [rows, keys] of one batch row; positions are counted from the bottom-right corner."""
    rows, keys = problem.lengths[batch_row] if problem.lengths else (problem.q_len, problem.kv_len)
    left, right = problem.window
    allowed = np.ones((problem.q_len, problem.kv_len), dtype=bool)
    if problem.mask is not None:
        bits = np.unpackbits(np.frombuffer(problem.mask, dtype=np.uint8), count=allowed.size)
        allowed = bits.reshape(allowed.shape).astype(bool)
    found = np.zeros((rows, keys), dtype=bool)
    for row in range(rows):
        for key in range(keys):
            behind = row + keys - rows - key
            found[row, key] = allowed[row, key] and not (
                (problem.causal and behind < 0) or (0 <= left < behind) or (0 <= right < -behind)
            )
    return found


def largest_weight(keys: int, logit_bound: float) -> float:
    """Of one key, if its logit is the highest and all others are the lowest."""
    return math.exp(logit_bound) / (math.exp(logit_bound) + (keys - 1) * math.exp(-logit_bound))


def own_row(keys: int, logit_bound: float) -> float:
    """Half the largest move of a row whose query, key and value all change: the worst split of the other keys."""
    high, low = math.exp(logit_bound), math.exp(-logit_bound)

    def stays(split: int) -> float:
        """The weight that stays where it was when `split` keys go up and the others go down."""
        up = split * low / (split * low + (keys - split) * high)
        others = keys - 1 - split
        down = others * low / (others * low + (split + 1) * high)
        return up + down

    return max(1.0 - stays(split) for split in range(keys))


def spent(spec: PrivacySpec, problem: AttentionProblem, plan: NoisePlan, power: int) -> float:
    """The largest sum, over the rows and heads that a record reaches, of (move / scale)**power.

    For power 2 that is mu squared of Gaussian noise, for power 1 the epsilon of Laplace noise. Infinite where
    something that moves has no noise.
    """
    heads = [float(plan.head_scale[head % len(plan.head_scale)]) for head in range(problem.q_heads)]
    return max(
        _of_batch_row(spec, problem, plan, heads, batch_row, power) for batch_row in range(len(problem.lengths) or 1)
    )


def _of_batch_row(
    spec: PrivacySpec, problem: AttentionProblem, plan: NoisePlan, heads: list[float], batch_row: int, power: int
) -> float:
    visible = sees(problem, batch_row)
    rows, keys = visible.shape
    clip, bound = problem.clip_norm or math.inf, problem.logit_bound or 0.0
    loads = [0.0] * (keys + rows)
    for row in range(rows):
        n = int(visible[row].sum())
        if n == 0:
            continue
        scale = plan.row_scale[n] if len(plan.row_scale) > 1 else plan.row_scale[0]

        def cost(move: float, scale: float = float(scale)) -> float:
            return sum((move / (head * scale)) ** power if head * scale > 0 else math.inf for head in heads)

        if spec.unit == "sequence":
            loads[0] += cost(clip * (2.0 if spec.relation == "replace" else 1.0))
            continue
        position = row + keys - rows
        if spec.queries == "private":
            # a query before the first key belongs to a token that has no key
            loads[position if position >= 0 else keys + row] += cost(2.0 * clip * own_row(n, bound))
        shared = cost(2.0 * clip * largest_weight(n, bound))
        for key in range(keys):
            if visible[row, key] and not (spec.queries == "private" and key == position):
                loads[key] += shared
    return max(loads, default=0.0)


def stretch(plan: NoisePlan) -> float:
    """How much further a record moves what is noised than the attention's rows, in the norm they are clipped in."""
    if plan.structure is None:
        return 1.0
    parameters = dict(plan.structure.parameters)
    if plan.structure.kind == "sparse" and parameters["rescale"]:
        return 1.0 / (1.0 - parameters["sparsity"])
    if plan.structure.kind == "block_diagonal" and plan.norm != "whitened_l2":
        # a Euclidean clip lets rows lie along the axis with the least noise
        return math.sqrt(parameters["condition"])
    return 1.0
