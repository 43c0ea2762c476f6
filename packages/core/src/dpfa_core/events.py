"""Privacy events: the only language that mechanisms, training and accountants share.

``noise_multiplier`` is std / l2 sensitivity, for Laplace b / l1 sensitivity. The order of positional
arguments is fixed. A plugin adds an event by subclassing ``Event`` in a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from dpfa_core.checks import fraction, integer, non_negative, one_of, positive, require
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.records import Record, decode, encode
from dpfa_core.spec import RELATIONS, Relation

INNER = "inner_event"
"""The JSON key of a field called ``event``, whose own name is taken by the class name."""


class Event(Record):
    """Base of all events; JSON is ``{"event": class name, **fields}``, an inner event under ``INNER``."""

    _classes: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        known = Event._classes.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PrivacyParameterError(
                f"an event class must have a name of its own, got a second {cls.__name__!r} in "
                f"{cls.__module__} beside {known.__module__}; rename it."
            )
        Event._classes[cls.__name__] = cls

    def to_json(self) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {"event": type(self).__name__} | {
            INNER if name == "event" else name: encode(getattr(self, name)) for name in names
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Restore any event from its JSON, also when called on the base class."""
        name = data.get("event") if isinstance(data, dict) else None
        kind = Event._classes.get(name) if isinstance(name, str) else None
        if kind is None or not issubclass(kind, cls):
            raise PrivacyParameterError(
                f"expected the JSON of an event ({', '.join(sorted(Event._classes))}), got {name!r}; "
                "install the package that defines it."
            )
        fields = {"event" if key == INNER else key: _restore(value) for key, value in data.items() if key != "event"}
        try:
            return kind(**fields)
        except TypeError as error:
            raise PrivacyParameterError(f"{name} could not be restored: {error}.") from error


def _restore(value: Any) -> Any:
    if isinstance(value, dict) and "event" in value:
        return Event.from_json(value)
    if isinstance(value, list):
        return tuple(_restore(item) for item in value)
    return decode(float, value)


def _event(name: str, value: object) -> None:
    require(isinstance(value, Event), f"{name} must be an event of dpfa_core.events", value)


@dataclass(frozen=True)
class Gaussian(Event):
    """Gaussian noise of std ``noise_multiplier`` times the l2 sensitivity."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        positive("noise_multiplier", self.noise_multiplier, remedy="Without noise the event is NonPrivate().")


@dataclass(frozen=True)
class Laplace(Event):
    """Laplace noise of scale b = ``noise_multiplier`` times the l1 sensitivity."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        positive("noise_multiplier", self.noise_multiplier, remedy="Without noise the event is NonPrivate().")


@dataclass(frozen=True)
class DiscreteGaussian(Event):
    """Gaussian noise on a grid; ``noise_multiplier`` = std / l2 sensitivity, grid margin included."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        positive("noise_multiplier", self.noise_multiplier, remedy="Without noise the event is NonPrivate().")


@dataclass(frozen=True)
class Exponential(Event):
    """Selection by the exponential mechanism, pure ``epsilon``.

    Each answer has probability proportional to exp(epsilon score / (2 sensitivity)), so that the log ratios of
    two neighbours lie in an interval of length ``epsilon``. Another pure selection is an ``EpsilonDelta``.
    """

    epsilon: float

    def __post_init__(self) -> None:
        positive("epsilon", self.epsilon)


@dataclass(frozen=True)
class RandomizedResponse(Event):
    """With probability ``noise_parameter`` the answer is uniform over ``num_buckets``.

    Priced for a replaced record; that holds for an added or removed one whose null record answers like some other
    record, or uniformly.
    """

    noise_parameter: float
    num_buckets: int

    def __post_init__(self) -> None:
        fraction("noise_parameter", self.noise_parameter, zero=False, one=True)
        integer("num_buckets", self.num_buckets, least=2)


@dataclass(frozen=True)
class EpsilonDelta(Event):
    """A release of which only (epsilon, delta) is known."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        non_negative("epsilon", self.epsilon)
        fraction("delta", self.delta)


@dataclass(frozen=True)
class NonPrivate(Event):
    """A release without any guarantee: epsilon is infinite."""


@dataclass(frozen=True)
class PoissonSampled(Event):
    """Each record takes part independently with ``sampling_probability``.

    Under "replace" a record that is not drawn must be no further from any other, in the sensitivity of ``event``,
    than two records are: so it is where it contributes 0 to a sum of clipped contributions.
    """

    sampling_probability: float
    event: Event
    relation: Relation = "add_or_remove"

    def __post_init__(self) -> None:
        fraction("sampling_probability", self.sampling_probability, zero=False, one=True)
        _event("event", self.event)
        one_of("relation", self.relation, RELATIONS)


@dataclass(frozen=True)
class TruncatedPoisson(Event):
    """Poisson sampling whose batch is cut to ``max_batch`` records.

    ``population`` is the public number of records; under "add_or_remove" a neighbour may hold one more.
    """

    sampling_probability: float
    max_batch: int
    population: int
    event: Event
    relation: Relation = "add_or_remove"

    def __post_init__(self) -> None:
        fraction("sampling_probability", self.sampling_probability, zero=False, one=True)
        integer("max_batch", self.max_batch, least=1)
        integer("population", self.population, least=1)
        _event("event", self.event)
        one_of("relation", self.relation, RELATIONS)


@dataclass(frozen=True)
class FixedSizeSampled(Event):
    """A uniformly random subset of exactly ``sample_size`` records."""

    sample_size: int
    population: int
    event: Event
    relation: Relation = "replace"

    def __post_init__(self) -> None:
        integer("sample_size", self.sample_size, least=1)
        integer("population", self.population, least=self.sample_size)
        _event("event", self.event)
        one_of("relation", self.relation, RELATIONS)


@dataclass(frozen=True)
class BallsInBins(Event):
    """In each of ``rounds``, every record falls into one of ``bins`` batches, uniformly and anew.

    ``event`` is the release of one batch; all batches of all rounds are released.
    """

    bins: int
    rounds: int
    event: Event
    relation: Relation = "add_or_remove"

    def __post_init__(self) -> None:
        integer("bins", self.bins, least=1)
        integer("rounds", self.rounds, least=1)
        _event("event", self.event)
        one_of("relation", self.relation, RELATIONS)


@dataclass(frozen=True)
class Composed(Event):
    """All of ``events``, one after the other, on the same records."""

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        require(isinstance(self.events, tuple), "events must be a tuple", self.events)
        for event in self.events:
            _event("each of events", event)


@dataclass(frozen=True)
class SelfComposed(Event):
    """``event`` released ``count`` times on the same records."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        _event("event", self.event)
        integer("count", self.count, least=1)
