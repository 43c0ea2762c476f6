"""One promise shared by several parts of a release: heads, or layers (PRIVACY P6).

One record touches every part, so the parts compose: for Gaussian noise the squares of mu = 1 / noise_multiplier
add up, for Laplace noise the epsilons do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpfa_core.checks import fraction, integer, is_real, one_of, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Composed, Event, Gaussian, Laplace, NonPrivate
from dpfa_core.records import Record
from dpfa_mechanisms.gaussian import Gaussian as GaussianMechanism
from dpfa_mechanisms.gaussian import gaussian_delta, gaussian_epsilon

Noise = Literal["gaussian", "laplace"]

SUM_ERROR = 2.0**-50
"""Covers the rounding of an exact sum, its root and its inverse."""

STEP = 2.0**-46
"""By this share the noise grows, again and again, until the parts together keep the target."""


@dataclass(frozen=True, kw_only=True)
class Allocation(Record):
    """Noise multipliers of all parts, and what they cost together."""

    strategy: Literal["uniform", "by_epsilons", "importance_based"]
    noise_multipliers: tuple[float, ...]
    """Each relative to its own part's sensitivity, as ``planning.noise_plan`` takes one for each head; 0: no noise."""
    part_epsilons: tuple[float, ...]
    """What each part alone costs at `delta`, rounded up; they do not add up to `epsilon` for Gaussian noise."""
    epsilon: float
    """What all parts together cost at `delta`, rounded up; infinite if a part has no noise."""
    delta: float
    event: Event
    """All parts together: one Gaussian as strong as all of them, or the Laplace releases one by one."""


def uniform(epsilon: float, delta: float, parts: int, *, mechanism: Noise = "gaussian") -> Allocation:
    """The same noise multiplier for every part.

    Guarantee: tested (the total reaches `epsilon` and never exceeds it).
    Raises: PrivacyParameterError.
    Source: PRIVACY P6.
    """
    integer("parts", parts, least=1)
    return _to_total("uniform", [1.0] * parts, epsilon, delta, mechanism)


def by_epsilons(
    head_epsilons: Sequence[float],
    delta: float,
    *,
    epsilon: float | None = None,
    allow_infinite: bool = False,
    heads: int | None = None,
    mechanism: Noise = "gaussian",
) -> Allocation:
    """An epsilon for each head.

    Alone, they are what each head costs, and the total is reported. With `epsilon` they fix the ratios only:
    the mu that each of them means at `delta` is scaled until all heads together cost `epsilon`.

    Guarantee: tested.
    Args: `allow_infinite` accepts heads without noise: multiplier 0, a total of infinity and the event
    ``NonPrivate``; `epsilon` then binds the other heads. `heads` is the length that the list must have.
    Raises: PrivacyParameterError.
    Source: PRIVACY P6.
    """
    epsilons = _numbers("head_epsilons", head_epsilons, heads, finite=False)
    endless = [head for head, value in enumerate(epsilons) if math.isinf(value)]
    if endless and not allow_infinite:
        raise PrivacyParameterError(
            f"head_epsilons must be finite numbers > 0, got inf for head {endless[0]}; a head without noise takes "
            "the privacy of the whole release with it, which allow_infinite_heads=True accepts."
        )
    require(
        len(endless) < len(epsilons),
        "head_epsilons must hold a finite number for at least one head",
        tuple(epsilons),
        "A release without any noise has epsilon=inf and no list.",
    )
    finite = [value for value in epsilons if math.isfinite(value)]
    alone = [_calibrate(value, delta, mechanism) for value in finite]
    if epsilon is None:
        noisy = _allocation("by_epsilons", alone, delta, mechanism, caps=finite)
    else:
        noisy = _to_total("by_epsilons", alone, epsilon, delta, mechanism)
    if not endless:
        return noisy
    multipliers, costs = iter(noisy.noise_multipliers), iter(noisy.part_epsilons)
    return Allocation(
        strategy="by_epsilons",
        noise_multipliers=tuple(0.0 if math.isinf(value) else next(multipliers) for value in epsilons),
        part_epsilons=tuple(math.inf if math.isinf(value) else next(costs) for value in epsilons),
        epsilon=math.inf,
        delta=delta,
        event=NonPrivate(),
    )


def importance_based(
    importances: Sequence[float],
    epsilon: float,
    delta: float,
    *,
    sensitivities: Sequence[float] | None = None,
    heads: int | None = None,
    mechanism: Noise = "gaussian",
) -> Allocation:
    """The least sum of importance times noise variance that keeps the total.

    With s_h the scale, D_h the sensitivity and w_h the importance of part h: minimising the sum of w s**2 under
    a fixed sum of (D / s)**2 gives s**2 proportional to D / sqrt(w); under a fixed sum of D / s (Laplace) it
    gives s**3 proportional to D / w.

    Guarantee: tested (no random allocation with the same total is better).
    Args: `importances` > 0 must be public; `sensitivities` of the parts where they differ, as those of layers do.
    Raises: PrivacyParameterError.
    Source: PRIVACY P6.
    """
    weights = _numbers("importances", importances, heads)
    moves = _numbers("sensitivities", sensitivities or [1.0] * len(weights), len(weights))
    if mechanism == "laplace":
        shape = [(move / weight) ** (1.0 / 3.0) / move for move, weight in zip(moves, weights, strict=True)]
    else:
        shape = [(move / math.sqrt(weight)) ** 0.5 / move for move, weight in zip(moves, weights, strict=True)]
    return _to_total("importance_based", shape, epsilon, delta, mechanism)


def _to_total(
    strategy: Literal["uniform", "by_epsilons", "importance_based"],
    shape: list[float],
    epsilon: float,
    delta: float,
    mechanism: Noise,
) -> Allocation:
    """The multipliers in the ratios of `shape` that together cost `epsilon`."""
    factor = _calibrate(epsilon, delta, mechanism) / _together(shape, mechanism)
    while True:
        multipliers = [factor * part for part in shape]
        together = _together(multipliers, mechanism)
        kept = 1.0 / together <= epsilon if mechanism == "laplace" else gaussian_delta(epsilon, together) <= delta
        if kept:
            return _allocation(strategy, multipliers, delta, mechanism, total=epsilon)
        factor *= 1.0 + STEP


def _allocation(
    strategy: Literal["uniform", "by_epsilons", "importance_based"],
    multipliers: list[float],
    delta: float,
    mechanism: Noise,
    *,
    total: float = math.inf,
    caps: list[float] | None = None,
) -> Allocation:
    """Args: `total` and `caps`, epsilons that are known to hold for all parts together and for each of them."""
    together = _together(multipliers, mechanism)
    costs = [_cost(multiplier, delta, mechanism) for multiplier in multipliers]
    if caps is not None:
        costs = [min(cost, cap) for cost, cap in zip(costs, caps, strict=True)]
    event: Event
    if mechanism == "laplace":
        event = Composed(tuple(Laplace(multiplier) for multiplier in multipliers))
    else:
        event = Gaussian(together)
    return Allocation(
        strategy=strategy,
        noise_multipliers=tuple(multipliers),
        part_epsilons=tuple(costs),
        epsilon=min(total, _cost(together, delta, mechanism)),
        delta=delta,
        event=event,
    )


def _calibrate(epsilon: float, delta: float, mechanism: Noise) -> float:
    one_of("mechanism", mechanism, ("gaussian", "laplace"))
    if mechanism == "gaussian":
        return GaussianMechanism().calibrate(epsilon, delta)
    positive("epsilon", epsilon, remedy="A release without noise has no noise multiplier.")
    fraction("delta", delta)
    return math.nextafter(1.0 / epsilon, math.inf)


def _cost(multiplier: float, delta: float, mechanism: Noise) -> float:
    return math.nextafter(1.0 / multiplier, math.inf) if mechanism == "laplace" else gaussian_epsilon(multiplier, delta)


def _together(multipliers: list[float], mechanism: Noise) -> float:
    """The one multiplier that is as strong as all of them, rounded down."""
    least = min(multipliers)
    power = 1.0 if mechanism == "laplace" else 2.0
    whole = math.fsum((least / part) ** power for part in multipliers)
    return float(least * whole ** (-1.0 / power) * (1.0 - SUM_ERROR))


def _numbers(name: str, values: Any, count: int | None, *, finite: bool = True) -> list[float]:
    good = isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) > 0
    require(good, f"{name} must be a list of numbers, one for each part", values)
    if count is not None and len(values) != count:
        raise PrivacyParameterError(f"{name} must hold {count} numbers, one for each part, got {len(values)}.")
    for part, value in enumerate(values):
        right = is_real(value) and value > 0 and (math.isfinite(value) or not finite)
        require(right, f"{name}[{part}] must be a {'finite ' if finite else ''}number > 0", value)
    return [float(value) for value in values]
