"""Long compositions of Poisson-sampled Gaussian releases, and an epsilon that each of them really has.

Neighbours differ by adding or removing a record, sensitivity 1. The values are lower bounds: losses rounded down
to a grid and convolved (dp-accounting 0.6, ``pessimistic_estimate=False`` without connected dots, grid 1e-6, 2e-6
for 100 steps), cut after the sixth decimal. Upper bounds certified by exact convolution lie between 5e-5 and 4e-3
of themselves above. They would not do here: a finer accountant may be below a certified value and right.
"""

from __future__ import annotations

from typing import NamedTuple


class Composition(NamedTuple):
    """`epsilon` is reached at `delta`."""

    noise_multiplier: float
    sampling_probability: float
    steps: int
    delta: float
    epsilon: float


SAMPLED = (
    Composition(1.0, 0.01, 1_000, 1e-5, 1.827736),
    Composition(2.0, 0.1, 100, 1e-5, 2.337299),
    Composition(0.8, 5e-3, 1_000, 1e-6, 2.003606),
    Composition(1.1, 256 / 60_000, 14_062, 1e-5, 2.374565),
    Composition(0.5, 1e-4, 10_000, 1e-5, 1.170340),
)
