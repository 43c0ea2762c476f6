"""Events: their positional order, their checks, and JSON that restores every one of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest

from dpfa_core import events
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import (
    BallsInBins,
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Exponential,
    FixedSizeSampled,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    RandomizedResponse,
    SelfComposed,
    TruncatedPoisson,
)

ALL = [
    Gaussian(1.0),
    Laplace(2),
    DiscreteGaussian(0.5),
    Exponential(1e-3),
    RandomizedResponse(0.25, 4),
    EpsilonDelta(1.0, 1e-6),
    NonPrivate(),
    PoissonSampled(0.01, Gaussian(1.1)),
    TruncatedPoisson(0.01, 512, 60_000, Gaussian(1.1)),
    FixedSizeSampled(32, 1000, Laplace(3.0)),
    BallsInBins(10, 100, Gaussian(0.7), "replace"),
    Composed((Gaussian(1.0), PoissonSampled(0.5, Laplace(1.0)), NonPrivate())),
    Composed(()),
    SelfComposed(Composed((SelfComposed(Gaussian(1.0), 3), Exponential(0.1))), 10**12),
]


def test_every_event_of_the_module_is_tried() -> None:
    known = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)}
    assert known - {Event} == {type(event) for event in ALL}


@pytest.mark.parametrize("event", ALL, ids=repr)
def test_json_restores_every_event(event: Event) -> None:
    data = event.to_json()
    assert data["event"] == type(event).__name__
    restored = Event.from_json(json.loads(json.dumps(data, allow_nan=False)))
    assert restored == event
    assert hash(restored) == hash(event)
    assert type(event).from_json(data) == event


def test_json_names_the_class_and_the_fields() -> None:
    assert PoissonSampled(0.01, Gaussian(1.5)).to_json() == {
        "event": "PoissonSampled",
        "sampling_probability": 0.01,
        "inner_event": {"event": "Gaussian", "noise_multiplier": 1.5},
        "relation": "add_or_remove",
    }


def test_positional_order_is_the_contract() -> None:
    order = {kind.__name__: [field.name for field in fields(kind)] for kind in map(type, ALL) if is_dataclass(kind)}
    assert order == {
        "Gaussian": ["noise_multiplier"],
        "Laplace": ["noise_multiplier"],
        "DiscreteGaussian": ["noise_multiplier"],
        "Exponential": ["epsilon"],
        "RandomizedResponse": ["noise_parameter", "num_buckets"],
        "EpsilonDelta": ["epsilon", "delta"],
        "NonPrivate": [],
        "PoissonSampled": ["sampling_probability", "event", "relation"],
        "TruncatedPoisson": ["sampling_probability", "max_batch", "population", "event", "relation"],
        "FixedSizeSampled": ["sample_size", "population", "event", "relation"],
        "BallsInBins": ["bins", "rounds", "event", "relation"],
        "Composed": ["events"],
        "SelfComposed": ["event", "count"],
    }


@pytest.mark.parametrize("kind", [Gaussian, Laplace, DiscreteGaussian])
@pytest.mark.parametrize("multiplier", [0, -1.0, math.inf, math.nan, "1", None, True])
def test_noise_multiplier_is_finite_and_positive(kind: Any, multiplier: Any) -> None:
    with pytest.raises(PrivacyParameterError, match=r"noise_multiplier must be a finite number > 0, got .* NonPrivate"):
        kind(multiplier)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exponential(0), "epsilon must be a finite number > 0"),
        (lambda: RandomizedResponse(0, 2), r"noise_parameter must be in \(0, 1\], got 0"),
        (lambda: RandomizedResponse(0.5, 1), "num_buckets must be an integer >= 2, got 1"),
        (lambda: EpsilonDelta(math.inf, 0), "epsilon must be a finite number >= 0"),
        (lambda: EpsilonDelta(1.0, 1), r"delta must be in \[0, 1\)"),
        (lambda: PoissonSampled(0.0, Gaussian(1.0)), r"sampling_probability must be in \(0, 1\], got 0\.0"),
        (lambda: PoissonSampled(1.1, Gaussian(1.0)), "sampling_probability"),
        (lambda: PoissonSampled(0.5, 1.0), "event must be an event of dpfa_core.events, got 1.0"),
        (lambda: PoissonSampled(0.5, Gaussian), "event must be an event"),
        (lambda: PoissonSampled(0.5, Gaussian(1.0), "swap"), "relation must be one of"),
        (lambda: TruncatedPoisson(0.5, 0, 10, Gaussian(1.0)), "max_batch must be an integer >= 1"),
        (lambda: FixedSizeSampled(11, 10, Gaussian(1.0)), "population must be an integer >= 11, got 10"),
        (lambda: BallsInBins(0, 1, Gaussian(1.0)), "bins must be an integer >= 1"),
        (lambda: Composed([Gaussian(1.0)]), "events must be a tuple"),
        (lambda: Composed((1,)), "each of events must be an event"),
        (lambda: SelfComposed(Gaussian(1.0), 0), "count must be an integer >= 1, got 0"),
        (lambda: SelfComposed(Gaussian(1.0), 2.0), "count must be an integer >= 1, got 2.0"),
    ],
)
def test_event_refuses(make: Any, message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        make()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"event": "Uniform"}, "got 'Uniform'; install the package that defines it"),
        ({"event": "Gaussian", "sigma": 1.0}, "Gaussian could not be restored"),
        ({"event": "Gaussian"}, "Gaussian could not be restored"),
        ({"event": "Gaussian", "noise_multiplier": "inf"}, "noise_multiplier must be a finite number"),
        ({"event": {"event": "Gaussian", "noise_multiplier": 1.0}}, "expected the JSON of an event"),
        ("Gaussian", "expected the JSON of an event"),
        ({}, "got None"),
    ],
)
def test_json_of_an_event_is_checked(data: Any, message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        Event.from_json(data)


def test_an_event_of_another_class_is_not_restored_as_this_one() -> None:
    with pytest.raises(PrivacyParameterError, match="got 'Laplace'"):
        Gaussian.from_json(Laplace(1.0).to_json())


def test_a_plugins_event_is_restored_and_its_name_is_its_own() -> None:
    @dataclass(frozen=True)
    class Staircase(Event):
        epsilon: float
        inner: Event

    try:
        event = Composed((Staircase(math.inf, Gaussian(1.0)),))
        assert Event.from_json(json.loads(json.dumps(event.to_json(), allow_nan=False))) == event
        with pytest.raises(PrivacyParameterError, match="a second 'Gaussian'"):
            type("Gaussian", (Event,), {"__module__": "somewhere.else"})
    finally:
        del Event._classes["Staircase"]
