"""How hard an examination looks."""

from __future__ import annotations

from typing import Literal, NamedTuple

from dpfa_core.checks import one_of

LevelName = Literal["quick", "default", "full"]


class Level(NamedTuple):
    """Numbers of trials; more of them find smaller deficits."""

    grid: int
    """Points of each axis of a grid: epsilon, delta, noise multiplier."""
    events: int
    """Kinds of events that an accountant is asked about."""
    deltas: tuple[float, ...]
    """At which an accountant is asked for epsilon."""
    sampled: int
    """Long sampled compositions."""
    shapes: int
    """Random attention problems for each operation."""
    values: int
    """Noise values of each law: 60,000 see a standard deviation 2 % short, 2,000,000 one 0.35 % short."""


LEVELS = {
    "quick": Level(grid=3, events=1, deltas=(1e-5,), sampled=0, shapes=6, values=60_000),
    "default": Level(grid=5, events=5, deltas=(1e-5,), sampled=2, shapes=24, values=250_000),
    "full": Level(grid=9, events=9, deltas=(1e-2, 1e-4, 1e-6, 1e-8), sampled=5, shapes=150, values=2_000_000),
}


def level_named(name: str) -> Level:
    """The level called `name`; PrivacyParameterError for another name."""
    one_of("level", name, tuple(LEVELS))
    return LEVELS[name]
