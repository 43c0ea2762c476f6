"""Epsilon against steps: computed before the first step, used by the progress bar and the report."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from dpfa_core.spending import spending
from dpfa_training import TrainingPlan

POINTS = 8


@dataclass(frozen=True)
class Curve:
    """Epsilon after some numbers of steps, by every accountant that has a bound."""

    steps: tuple[int, ...]
    epsilon: tuple[float, ...]
    """The least valid upper bound at each of `steps`."""
    by_accountant: tuple[tuple[str, tuple[float, ...]], ...]

    def at_most(self, steps: int) -> float:
        """An upper bound of epsilon after `steps` steps: that of the next point computed."""
        if steps == 0:
            return 0.0
        return self.epsilon[min(bisect.bisect_left(self.steps, steps), len(self.steps) - 1)]


def curve(plan: TrainingPlan, total: int, delta: float) -> Curve:
    """Price ``POINTS`` evenly spaced numbers of steps up to `total`."""
    points = sorted({max(1, round(total * index / POINTS)) for index in range(1, POINTS + 1)})
    prices = [spending(((plan.event(), count),), delta) for count in points]
    names = [name for name, _ in prices[-1].by_accountant]
    columns = tuple(
        (name, tuple(dict(price.by_accountant).get(name, float("nan")) for price in prices)) for name in names
    )
    return Curve(tuple(points), tuple(price.epsilon for price in prices), columns)
