"""A clip norm that follows a private quantile of the records' norms, one noisy count for each call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_attention.recomputation import checkpointed, in_backward
from dpfa_core.errors import NotPrivateError
from dpfa_core.events import DiscreteGaussian, Event
from dpfa_core.ledger import Ledger
from dpfa_core.spec import Unit
from dpfa_mechanisms.quantiles import noisy_count_quantile

SHARE = 0.1
"""Of a call's epsilon and delta, for the count; the release has the rest."""

QUANTILE = 0.5
"""Of the records' norms, which the clip follows: half of the records are not clipped at all."""

LEARNING_RATE = 0.2
"""The clip moves by exp(0.1) at most in one call, as a share of records between 0 and 1 moves it."""

BOUNDS = (2.0**-10, 2.0**10)
"""The clip stays between these, which are public."""


class Moved(NamedTuple):
    """What one count gave."""

    clip_norm: float
    epsilon: float
    delta: float
    event_id: str


def shares(epsilon: float, delta: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(epsilon, delta) of the count and of the release, which add up to at most those given."""
    count = epsilon * SHARE, delta * SHARE
    return count, (math.nextafter(epsilon - count[0], 0.0), math.nextafter(delta - count[1], 0.0))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would keep one count as a constant
def moved_clip(
    v: Tensor,
    lengths: tuple[tuple[int, int], ...],
    clip_norm: float,
    *,
    unit: Unit,
    norm: str,
    epsilon: float,
    delta: float,
    ledger: Ledger,
) -> Moved:
    """Count the records whose largest value row is at most `clip_norm`, with noise, and move the clip by the result.

    A record has one number, the largest norm of its rows over all heads: of a batch row for unit="sequence", of a
    position for "token". Replacing it moves the count by 2, and so does a null record in its place. The count is
    charged before it is drawn. Its noise comes from the operating system, whatever seed the release has.

    Guarantee: tested (sensitivity, price, one line of the ledger).
    Args: v [B, Sk, H, D]; `lengths`, (queries, keys) of each batch row, empty means full; `norm` of the rows;
        `epsilon` and `delta` of the count.
    Raises: NotPrivateError where it could run twice for one output; LedgerError, BudgetExhausted.
    Source: Andrew, Thakkar, McMahan & Ramaswamy 2021.
    """
    twice = in_backward() or checkpointed(gradients=torch.is_grad_enabled())
    if twice or torch._C._are_functorch_transforms_active():
        raise NotPrivateError(
            "adaptive noise must count once for each output, got a call inside a checkpointed region, a backward pass "
            "or a transform of torch.func; use checkpoint_gradients, or enable_adaptive_noise(False)."
        )
    noise_multiplier = _noise_multiplier(epsilon, delta)
    ids: list[str] = []

    def record(event: Event) -> None:
        purpose = "calibration: noisy count of norms below the clip"
        ids.append(ledger.record(event, purpose=purpose, mechanism="discrete_gaussian", backend="none"))

    norms = records_norms(v, lengths, unit=unit, norm=norm)
    found = noisy_count_quantile(
        [norms],
        QUANTILE,
        noise_multiplier=noise_multiplier,
        expected_size=max(1, len(norms)),
        initial=clip_norm,
        steps=1,
        record=record,
        learning_rate=LEARNING_RATE,
        relation="replace",
    )
    # a count of few records is mostly noise, and a share beyond 0 or 1 is nothing else
    step = math.exp(LEARNING_RATE / 2.0)
    low, high = max(BOUNDS[0], clip_norm / step), min(BOUNDS[1], clip_norm * step)
    return Moved(min(max(found.value, low), high), epsilon, delta, ids[0])


def records_norms(v: Tensor, lengths: tuple[tuple[int, int], ...], *, unit: Unit, norm: str) -> list[float]:
    """One number for each record, private: the largest norm of its value rows that are no padding."""
    with torch.no_grad():
        rows = torch.linalg.vector_norm(v.float(), ord=1 if norm == "l1" else 2, dim=-1).amax(-1)
    keys = [keys for _, keys in lengths] or [v.shape[1]] * v.shape[0]
    each = [row[:many] for row, many in zip(rows.cpu(), keys, strict=True)]
    if unit == "token":
        return [value for row in each for value in row.tolist()]
    return [float(row.max()) if len(row) else 0.0 for row in each]


def largest_norm(v: Tensor, lengths: tuple[tuple[int, int], ...]) -> float:
    """The largest L2 norm of a value row that is no padding: private, and without noise."""
    return max(records_norms(v.detach(), lengths, unit="sequence", norm="l2"), default=0.0)


@lru_cache(maxsize=64)
def _noise_multiplier(epsilon: float, delta: float) -> float:
    return calibrate_noise_multiplier(DiscreteGaussian, epsilon, delta)
