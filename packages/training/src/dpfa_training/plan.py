"""One configuration from which sampler, clip, noise and privacy event follow together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dpfa_core.checks import integer, non_negative, one_of, positive, require
from dpfa_core.events import Event, Gaussian, NonPrivate, SelfComposed
from dpfa_core.records import Record
from dpfa_core.spec import Relation
from dpfa_training.adaptive_clipping import QuantileClipping
from dpfa_training.sampling import BallsInBins, FixedSize, Poisson, PoissonUpTo, Sampler
from dpfa_training.threshold_groups import ClippingChoice, checked_choice

Sampling = Literal["poisson", "fixed_size", "balls_in_bins", "truncated_poisson", "none"]
Reduction = Literal["mean", "sum"]
TrainingUnit = Literal["example", "user"]

PRIVATE_SAMPLINGS = ("poisson", "fixed_size", "balls_in_bins", "truncated_poisson")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Record):
    """DP-SGD as it runs: every number that the guarantee depends on, and nothing else.

    Guarantee: tested. Each step releases ``(sum_i c_i g_i + z D N(0, I)) / b`` over the units that the sampler
    drew, with ``c_i = min(1, C / ||g_i||)``, C ``max_grad_norm``, z the noise multiplier, D the sensitivity of
    the sum under the sampler's relation (C for add_or_remove, 2 C for replace) and b the expected batch size, a
    public constant.

    Args:
        noise_multiplier: std of the noise on the sum of clipped gradients, divided by ``l2_sensitivity``.
        max_grad_norm: clip threshold C for the l2 norm of one unit's whole gradient.
        population: number of units (training records, or users), treated as public.
        expected_batch_size: b, in units; each takes part in a step with probability b / population.
        sampling: "poisson"; "fixed_size" (b units without replacement); "balls_in_bins" (an epoch is a round in
            which every unit falls into one batch); "truncated_poisson" (at most `max_batch` units); "none" only
            without noise.
        clipping: how one unit's gradient is brought below `max_grad_norm`, see ``threshold_groups``: "flat", one
            norm over all parameters; "per_layer" and "per_head", with C / sqrt(groups) for each group; {parameter
            or prefix: threshold}, with at most C for all together; "automatic", ``c_i = C / (||g_i|| + 0.01)``;
            or a ``QuantileClipping``, whose C begins at `max_grad_norm`. One std of noise serves all groups.
        reduction: how the user's loss joins the rows of a batch.
        max_batch: largest draw of "truncated_poisson", in units.
        unit: "example", a record; or "user", all records of a user together.

    Raises: PrivacyParameterError.
    """

    noise_multiplier: float
    max_grad_norm: float
    population: int
    expected_batch_size: int
    sampling: Sampling = "poisson"
    clipping: ClippingChoice = "flat"
    reduction: Reduction = "mean"
    max_batch: int | None = None
    unit: TrainingUnit = "example"

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
        one_of("sampling", self.sampling, (*PRIVATE_SAMPLINGS, "none"))
        require(
            self.sampling != "none" or self.noise_multiplier == 0,
            f"sampling must be one of {', '.join(map(repr, PRIVATE_SAMPLINGS))} wherever noise is added",
            self.sampling,
            "No other sampler is accounted for.",
        )
        require(
            self.max_batch is None or self.sampling == "truncated_poisson",
            'max_batch must be left out unless sampling="truncated_poisson"',
            self.max_batch,
            "Only that sampler has a largest draw.",
        )
        object.__setattr__(self, "clipping", checked_choice(self.clipping))
        one_of("reduction", self.reduction, ("mean", "sum"))
        one_of("unit", self.unit, ("example", "user"))
        self.sampler()
        self.gradient_noise_multiplier  # noqa: B018  (refuses a count that costs as much as the step)

    def sampler(self) -> Sampler:
        """Who takes part in a step; with "none" it stands for the order of the user's loader."""
        sizes = self.population, self.expected_batch_size
        match self.sampling:
            case "fixed_size":
                return FixedSize(*sizes)
            case "balls_in_bins":
                return BallsInBins(*sizes)
            case "truncated_poisson":
                return PoissonUpTo(*sizes, self.max_batch or 0)
        return Poisson(*sizes)

    @property
    def relation(self) -> Relation:
        """The neighbouring relation that the sampler's amplification holds for."""
        return self.sampler().relation

    @property
    def sampling_probability(self) -> float:
        """Probability that a unit takes part in a step, rounded up, so that accounting never uses less."""
        return self.sampler().sampling_probability

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each unit is drawn once (in expectation), rounded up; the loader's length."""
        return self.sampler().steps_per_epoch

    @property
    def steps_per_charge(self) -> int:
        """Steps that one ``event`` pays for: a whole round of balls in bins, else one."""
        return self.sampler().steps_per_round

    @property
    def l2_sensitivity(self) -> float:
        """By how much one unit moves the *sum* of clipped gradients, of all groups together."""
        return self._moved_by(self.max_grad_norm)

    @property
    def noise_std(self) -> float:
        """Std of the noise on the *sum* of clipped gradients."""
        return self.noise_std_at(self.max_grad_norm)

    def noise_std_at(self, clip_norm: float) -> float:
        """``noise_std`` where a unit's whole contribution is at most `clip_norm`, which an adaptive clip moves."""
        noise_multiplier = self.gradient_noise_multiplier
        return math.nextafter(noise_multiplier * self._moved_by(clip_norm), math.inf) if self.noisy else 0.0

    @property
    def gradient_noise_multiplier(self) -> float:
        """``noise_multiplier``, or more where a count is released beside the gradients for the same event."""
        if not isinstance(self.clipping, QuantileClipping):
            return self.noise_multiplier
        sizes = self.expected_batch_size, self._moved_by(0.5)
        return self.clipping.gradient_noise_multiplier(self.noise_multiplier, *sizes)

    @property
    def count_noise_std(self) -> float:
        """Std of the noise on the centred count of an adaptive clip; 0 without one."""
        if not isinstance(self.clipping, QuantileClipping):
            return 0.0
        return self.clipping.count_std(self.noise_multiplier, self.expected_batch_size, self._moved_by(0.5))

    def _moved_by(self, contribution: float) -> float:
        """How far a sum moves with one unit of at most `contribution`: a replaced one is taken away and added."""
        return 2.0 * contribution if self.relation == "replace" else contribution

    @property
    def noisy(self) -> bool:
        return self.noise_multiplier > 0

    def charges(self, steps: int) -> int:
        """How many ``event`` `steps` steps cost; a begun round is paid as a whole one."""
        return -(-steps // self.steps_per_charge)

    def event(self) -> Event:
        """What one charge costs: one optimiser step, or one round of them."""
        if not self.noisy:
            return NonPrivate()
        return self.sampler().event(Gaussian(self.noise_multiplier))

    def total(self, steps: int) -> Event:
        """What `steps` steps cost together."""
        return SelfComposed(self.event(), self.charges(steps))
