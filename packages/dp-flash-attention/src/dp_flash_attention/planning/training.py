"""DP-SGD planned from public numbers: of four quantities three are given and one is found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from dp_flash_attention.planning import cautions
from dp_flash_attention.planning.memory import OPTIMIZERS, training_memory
from dp_flash_attention.planning.pricing import Say, nobody, priced_by_all
from dpfa_accounting.calibration import calibrate
from dpfa_core.checks import fraction, integer, one_of, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import EpsilonDelta, Event, Gaussian, PoissonSampled, SelfComposed
from dpfa_core.spending import within

EXACT = 1e-9
"""Of epsilon: so near that the search for steps ends between two neighbours."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingQuestion:
    """Three of epsilon, noise multiplier, batch size and length (epochs or steps); the fourth is None."""

    delta: float
    records: int
    """Public number of training records, or of users where unit="user"."""
    epsilon: float | None = None
    noise_multiplier: float | None = None
    batch_size: int | None = None
    """Expected size of a Poisson batch."""
    epochs: int | None = None
    steps: int | None = None
    unit: str = "example"
    parameters: int | None = None
    """Trained parameters of the model."""
    optimizer: str = "adam"
    seconds_per_step: float | None = None
    """Measured by whoever asks; nothing here guesses a speed."""

    def __post_init__(self) -> None:
        fraction("delta", self.delta, zero=False)
        integer("records", self.records, least=1)
        one_of("unit", self.unit, ("example", "user"))
        one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("epsilon", "noise_multiplier", "seconds_per_step"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("batch_size", "epochs", "steps", "parameters"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), least=1)
        require(
            self.batch_size is None or self.batch_size <= self.records,
            f"batch_size must not exceed the {self.records} records",
            self.batch_size,
        )
        if self.epochs is not None and self.steps is not None:
            raise PrivacyParameterError(
                f"either epochs or steps must be given, got epochs={self.epochs} and steps={self.steps}; leave out one."
            )
        given = [name for name in FOUR if self._value(name) is not None]
        if len(given) != 3:
            remedy = "leave out the one that you want to know" if len(given) == 4 else "add what is missing"
            raise PrivacyParameterError(
                "three of epsilon, noise_multiplier, batch_size and epochs or steps must be given, and the fourth is "
                f"solved for, got {', '.join(given) or 'none of them'}; {remedy}."
            )

    def _value(self, name: str) -> Any:
        return (self.epochs or self.steps) if name == "steps" else getattr(self, name)

    @property
    def unknown(self) -> str:
        """Which of the four is solved for."""
        (name,) = (name for name in FOUR if self._value(name) is None)
        return name


FOUR = ("epsilon", "noise_multiplier", "batch_size", "steps")


@dataclass(frozen=True, kw_only=True)
class TrainingAnswer:
    """All four quantities, and what follows from them."""

    question: TrainingQuestion
    noise_multiplier: float
    batch_size: int
    steps: int

    @property
    def sampling_probability(self) -> float:
        """Batch size / records, rounded up."""
        return sampling_probability(self.batch_size, self.question.records)

    def event(self, steps: int | None = None, noise_multiplier: float | None = None) -> Event:
        """The whole training, or the same with another length or noise."""
        return training_event(noise_multiplier or self.noise_multiplier, self.sampling_probability, steps or self.steps)

    @property
    def signal_to_noise(self) -> float | None:
        """At most this times its noise is an averaged gradient long: both are norms over all parameters."""
        size = self.question.parameters
        return None if size is None else self.batch_size / (self.noise_multiplier * math.sqrt(size))


def sampling_probability(batch_size: int, records: int) -> float:
    """Rounded up, as the training itself does."""
    return min(1.0, math.nextafter(batch_size / records, 2.0))


def training_event(noise_multiplier: float, probability: float, steps: int) -> Event:
    """Poisson-sampled Gaussian steps under add_or_remove."""
    return SelfComposed(PoissonSampled(probability, Gaussian(noise_multiplier)), steps)


def length_in_steps(question: TrainingQuestion, batch_size: int) -> int | None:
    """Steps of the training; an epoch is records / batch_size of them, rounded up."""
    if question.epochs is None:
        return question.steps
    return question.epochs * -(-question.records // batch_size)


def solve(question: TrainingQuestion, say: Say = nobody) -> TrainingAnswer:
    """Find the quantity left out.

    Guarantee: tested; an accountant prices the very answer, so a search can cost noise or steps but never privacy.
    Raises: PrivacyParameterError if nothing keeps epsilon; UnsupportedEvent if nobody can price it.
    """
    epsilon, noise_multiplier, batch_size = question.epsilon, question.noise_multiplier, question.batch_size
    say(question.unknown.replace("_", " "))
    if batch_size is None:
        batch_size = _largest_batch(question)
    probability, steps = sampling_probability(batch_size, question.records), length_in_steps(question, batch_size)
    if noise_multiplier is None:
        noise_multiplier = calibrate(
            lambda z: training_event(z, probability, _given(steps)), EpsilonDelta(_given(epsilon), question.delta)
        )
    if steps is None:
        noise = noise_multiplier
        steps = calibrate(
            lambda count: training_event(noise, probability, count),
            EpsilonDelta(_given(epsilon), question.delta),
            parameter="steps",
            relative_tolerance=EXACT,
        )
    return TrainingAnswer(question=question, noise_multiplier=noise_multiplier, batch_size=batch_size, steps=steps)


def _largest_batch(question: TrainingQuestion) -> int:
    """Found for a sampling probability, then made a whole number and priced again."""
    epsilon, noise_multiplier, records = _given(question.epsilon), _given(question.noise_multiplier), question.records

    def affordable(batch_size: int) -> bool:
        steps = _given(length_in_steps(question, batch_size))
        whole = training_event(noise_multiplier, sampling_probability(batch_size, records), steps)
        return within(((whole, 1),), question.delta, epsilon)

    if not affordable(1):
        raise PrivacyParameterError(
            f"epsilon must be one that a batch of 1 keeps, got {epsilon:g} at delta={question.delta:g}; raise epsilon "
            "or the noise multiplier, or take fewer steps."
        )
    probability = calibrate(
        lambda q: training_event(noise_multiplier, q, question.steps or _given(question.epochs) * math.ceil(1.0 / q)),
        EpsilonDelta(epsilon, question.delta),
        parameter="sampling_probability",
    )
    # steps jump with the batch size where epochs are given, so the whole numbers around are priced themselves
    batch_size = max(1, math.floor(probability * records))
    while not affordable(batch_size):
        batch_size -= 1
    while batch_size < records and affordable(batch_size + 1):
        batch_size += 1
    return batch_size


def _given(value: T | None) -> T:
    assert value is not None  # noqa: S101  (the question holds all but one, which is not this one)
    return value


def plan_training(question: TrainingQuestion, say: Say = nobody) -> tuple[TrainingAnswer, dict[str, Any]]:
    """The answer, and all that is told of it as JSON."""
    answer = solve(question, say)
    total = priced_by_all(answer.event(), 1, question.delta, say)
    per_epoch = -(-question.records // answer.batch_size)
    ratio = answer.signal_to_noise
    warnings = cautions.of_the_promise(
        total.epsilon, question.delta, question.records, "training records" if question.unit == "example" else "users"
    ) + cautions.of_an_update(ratio, answer.noise_multiplier, question.parameters)
    return answer, {
        "solved_for": question.unknown,
        "noise_multiplier": answer.noise_multiplier,
        "batch_size": answer.batch_size,
        "records": question.records,
        "sampling_probability": answer.sampling_probability,
        "steps": answer.steps,
        "epochs": answer.steps / per_epoch,
        "epsilon": total.epsilon,
        "target_epsilon": question.epsilon,
        "delta": question.delta,
        "epsilons": dict(total.by_accountant),
        "no_bound": dict(total.reasons),
        "remarks": [f"{name}: {remark}" for name, remark in total.remarks],
        "unit": question.unit,
        "relation": "add_or_remove",
        "signal_to_noise": ratio,
        "memory_bytes": training_memory(question.parameters, question.optimizer) if question.parameters else None,
        "seconds": answer.steps * question.seconds_per_step if question.seconds_per_step else "not measured",
        "warnings": warnings,
    }
