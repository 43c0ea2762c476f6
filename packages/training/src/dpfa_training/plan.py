"""One configuration from which sampler, clip, noise and privacy event follow together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dpfa_core.checks import integer, non_negative, one_of, positive, require
from dpfa_core.events import Event, Gaussian, NonPrivate, PoissonSampled
from dpfa_core.records import Record
from dpfa_core.spec import Relation

Sampling = Literal["poisson", "none"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Record):
    """DP-SGD as it runs: every number that the guarantee depends on, and nothing else.

    Guarantee: tested. Each step releases ``(sum_i c_i g_i + z C N(0, I)) / b`` over a Poisson batch, with
    ``c_i = min(1, C / ||g_i||)``, z the noise multiplier, C ``max_grad_norm`` and b the expected batch size,
    a public constant.

    Args:
        noise_multiplier: std of the noise on the sum of clipped gradients, divided by ``max_grad_norm``.
        max_grad_norm: clip threshold C for the l2 norm of one example's whole gradient.
        population: number of training records, treated as public.
        expected_batch_size: b; each record takes part in a step with probability b / population.
        sampling: "poisson"; "none" only without noise.
        clipping: "flat", one norm over all parameters.
        reduction: how the user's loss joins the rows of a batch.

    Raises: PrivacyParameterError.
    """

    noise_multiplier: float
    max_grad_norm: float
    population: int
    expected_batch_size: int
    sampling: Sampling = "poisson"
    clipping: Literal["flat"] = "flat"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("max_grad_norm", self.max_grad_norm)
        integer("population", self.population, least=1)
        integer("expected_batch_size", self.expected_batch_size, least=1)
        require(
            self.expected_batch_size <= self.population,
            f"expected_batch_size must not exceed the {self.population} training records",
            self.expected_batch_size,
            "Choose a smaller batch size.",
        )
        one_of("sampling", self.sampling, ("poisson", "none"))
        require(
            self.sampling == "poisson" or self.noise_multiplier == 0,
            'sampling must be "poisson" wherever noise is added',
            self.sampling,
            "No other sampler is accounted for.",
        )
        one_of("clipping", self.clipping, ("flat",))
        one_of("reduction", self.reduction, ("mean", "sum"))

    @property
    def relation(self) -> Relation:
        """Poisson sampling goes with the addition or removal of one record."""
        return "add_or_remove"

    @property
    def sampling_probability(self) -> float:
        """b / population, rounded up where it is not exact, so that accounting never uses less."""
        exact = Fraction(self.expected_batch_size, self.population)
        rounded = self.expected_batch_size / self.population
        return rounded if Fraction(rounded) >= exact else min(1.0, math.nextafter(rounded, 2.0))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each record is drawn once in expectation, rounded up; the loader's length."""
        return -(-self.population // self.expected_batch_size)

    @property
    def noise_std(self) -> float:
        """Std of the noise on the *sum* of clipped gradients."""
        return math.nextafter(self.noise_multiplier * self.max_grad_norm, math.inf) if self.noisy else 0.0

    @property
    def noisy(self) -> bool:
        return self.noise_multiplier > 0

    def event(self) -> Event:
        """What one optimiser step costs."""
        if not self.noisy:
            return NonPrivate()
        return PoissonSampled(self.sampling_probability, Gaussian(self.noise_multiplier), self.relation)
