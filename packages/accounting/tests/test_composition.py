from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_accounting.composition import leaves, merged
from dpfa_accounting.reduction import equal
from dpfa_core.errors import PrivacyParameterError, UnsupportedEvent
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
from dpfa_core.registry import ACCOUNTANTS

NAMES = ("gdp", "rdp", "pld", "prv")
DELTA = 1e-5
STEP = PoissonSampled(0.1, Gaussian(2.0))
REPLACED = PoissonSampled(0.1, Gaussian(1.0), "replace")

multipliers = st.floats(0.5, 20.0).map(lambda x: round(x, 3))
events = st.recursive(
    multipliers.map(Gaussian) | st.builds(PoissonSampled, st.sampled_from([0.01, 0.5, 1.0]), multipliers.map(Gaussian)),
    lambda inner: (
        st.builds(SelfComposed, inner, st.integers(1, 4))
        | st.lists(inner, max_size=3).map(lambda parts: Composed(tuple(parts)))
    ),
    max_leaves=5,
)


def event_for(name: str) -> Event:
    return Gaussian(3.0) if name == "gdp" else STEP


@pytest.mark.parametrize("name", NAMES)
def test_selfcomposed_equals_repeated_compose(name: str) -> None:
    event = event_for(name)
    nested = ACCOUNTANTS.create(name).compose(SelfComposed(Composed((event, SelfComposed(event, 2))), 2))
    repeated = ACCOUNTANTS.create(name)
    for _ in range(6):
        repeated.compose(event)
    counted = ACCOUNTANTS.create(name).compose(event, 6)
    assert nested.epsilon(DELTA) == repeated.epsilon(DELTA) == counted.epsilon(DELTA)
    assert nested.state() == repeated.state() == counted.state()


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter(name: str) -> None:
    parts = [Gaussian(5.0), Gaussian(3.0)] + ([] if name == "gdp" else [STEP, PoissonSampled(0.05, Gaussian(1.5))])
    forward, backward = ACCOUNTANTS.create(name), ACCOUNTANTS.create(name)
    for event in parts:
        forward.compose(event)
    backward.compose(Composed(tuple(reversed(parts))))
    assert forward.epsilon(DELTA) == backward.epsilon(DELTA)
    assert forward.delta(0.7) == backward.delta(0.7)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_costs_nothing(name: str) -> None:
    empty = ACCOUNTANTS.create(name)
    assert empty.epsilon(DELTA) == empty.epsilon(0.0) == empty.delta(0.0) == 0.0
    assert empty.compose(Composed(())).epsilon(DELTA) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("event", [NonPrivate(), SelfComposed(NonPrivate(), 3), PoissonSampled(0.1, NonPrivate())])
def test_one_release_without_privacy_is_infinite(name: str, event: Event) -> None:
    account = ACCOUNTANTS.create(name).compose(Gaussian(9.0)).compose(event)
    assert account.epsilon(DELTA) == math.inf
    assert account.delta(50.0) == 1.0
    assert type(account).from_state(account.state()).epsilon(DELTA) == math.inf


@pytest.mark.parametrize("name", NAMES)
def test_state_is_json_of_events_and_goes_on(name: str) -> None:
    event = event_for(name)
    account = ACCOUNTANTS.create(name).compose(event, 7).compose(Gaussian(11.0))
    state = json.loads(json.dumps(account.state()))
    assert "epsilon" not in json.dumps(state)
    restored = type(account).from_state(state)
    assert restored.epsilon(DELTA) == account.epsilon(DELTA)
    restored.compose(event)
    assert restored.state()["events"] != state["events"]
    # an account can change hands
    assert ACCOUNTANTS.load("rdp").from_state(state).epsilon(DELTA) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("state", [{}, {"events": 3}, {"events": [1]}, {"events": [[{"event": "Nope"}, 1]]}, None])
def test_a_bad_state_is_refused(state: object) -> None:
    with pytest.raises(PrivacyParameterError):
        ACCOUNTANTS.load("rdp").from_state(state)  # type: ignore[attr-defined]


def test_counts_of_a_state_are_checked() -> None:
    with pytest.raises(PrivacyParameterError, match="count must be an integer >= 1, got -5"):
        ACCOUNTANTS.load("gdp").from_state({"events": [[Gaussian(1.0).to_json(), -5]]})  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(events)
def test_leaves_hold_no_composition_and_keep_the_number_of_releases(event: Event) -> None:
    def size(event: Event) -> int:
        match event:
            case Composed(parts):
                return sum(size(part) for part in parts)
            case SelfComposed(part, count):
                return count * size(part)
        return 1

    found = list(leaves(event))
    assert not any(isinstance(leaf, Composed | SelfComposed) for leaf, _ in found)
    assert sum(count for _, count in found) == size(event)


@settings(max_examples=60, deadline=None)
@given(events, st.integers(1, 3))
def test_rdp_of_a_composition_is_the_sum_over_its_leaves(event: Event, count: int) -> None:
    whole, parts = ACCOUNTANTS.create("rdp"), ACCOUNTANTS.create("rdp")
    whole.compose(event, count)
    for leaf, times in leaves(event):
        for _ in range(times * count):
            parts.compose(leaf)
    assert whole.epsilon(DELTA) == parts.epsilon(DELTA)
    assert whole.compose(Gaussian(4.0)).epsilon(DELTA) > parts.epsilon(DELTA)


@given(st.lists(st.tuples(multipliers, st.integers(1, 50)), min_size=1, max_size=6))
def test_merged_gaussians_have_no_less_than_the_joint_mu(parts: list[tuple[float, int]]) -> None:
    ((joint, count),) = merged([(Gaussian(multiplier), times) for multiplier, times in parts])
    exact = sum(times / Fraction(multiplier) ** 2 for multiplier, times in parts)
    assert count == 1
    assert isinstance(joint, Gaussian)
    found = 1 / Fraction(joint.noise_multiplier) ** 2
    assert exact <= found <= exact * (1 + Fraction(1, 10**14))


def test_gaussians_on_one_sample_are_one_release_of_it() -> None:
    groups = PoissonSampled(0.1, Composed((Gaussian(2.0), SelfComposed(Gaussian(4.0), 4))))
    joint = math.sqrt(1 / (1 / 4 + 4 / 16))
    ((leaf, count),) = leaves(groups, 9)
    assert count == 9
    assert isinstance(leaf, PoissonSampled)
    assert isinstance(leaf.event, Gaussian)
    assert leaf.event.noise_multiplier == pytest.approx(joint)


def test_a_sample_of_everybody_is_no_sample() -> None:
    exact = ACCOUNTANTS.create("gdp").compose(Gaussian(2.0), 3).epsilon(DELTA)
    for event in (PoissonSampled(1.0, Gaussian(2.0)), FixedSizeSampled(8, 8, Gaussian(2.0))):
        assert ACCOUNTANTS.create("gdp").compose(event, 3).epsilon(DELTA) == exact


@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_more_releases_cost_more_and_a_larger_delta_less(name: str) -> None:
    account = ACCOUNTANTS.create(name).compose(STEP, 10)
    first = account.epsilon(DELTA)
    assert account.epsilon(1e-3) < first < account.epsilon(1e-7)
    assert account.delta(first) <= DELTA * (1 + 1e-6)
    assert account.delta(2 * first) < account.delta(first)
    assert account.compose(STEP).epsilon(DELTA) > first


@pytest.mark.parametrize(
    ("name", "event", "text"),
    [
        (
            "gdp",
            STEP,
            "exact for Gaussian releases on the whole data, got PoissonSampled around Gaussian (central-limit",
        ),
        ("gdp", STEP, "are no bound); use rdp, pld or prv."),
        ("gdp", Laplace(1.0), "got Laplace"),
        ("gdp", BallsInBins(4, 2, Gaussian(1.0)), "got BallsInBins around Gaussian"),
        ("rdp", REPLACED, "Poisson sampling under add_or_remove, got relation='replace'"),
        ("rdp", REPLACED, "(doubling the sensitivity is no bound for sampled releases); use pld."),
        ("prv", REPLACED, "(doubling the sensitivity is no bound for sampled releases); use pld."),
        ("pld", DiscreteGaussian(1.0), "its losses depend on the grid, which the event does not hold; use rdp."),
        ("pld", PoissonSampled(0.5, DiscreteGaussian(1.0)), "for PoissonSampled around DiscreteGaussian; use rdp."),
        ("prv", Laplace(1.0), "PRV prices Gaussian releases, whole or Poisson sampled, got Laplace; use rdp or pld."),
        ("rdp", FixedSizeSampled(1, 10, Gaussian(1.0), "add_or_remove"), "state replace, or sample by Poisson"),
        ("pld", FixedSizeSampled(1, 10, Gaussian(1.0), "add_or_remove"), "no installed accountant prices it."),
        ("rdp", FixedSizeSampled(2, 9, STEP), "got FixedSizeSampled around PoissonSampled; no installed accountant"),
        ("rdp", BallsInBins(2, 9, STEP), "a sample inside another one has no proved price"),
        ("rdp", PoissonSampled(0.1, SelfComposed(STEP, 2)), "a sample inside another one has no proved price"),
    ],
)
def test_refusals_name_the_event_and_a_remedy(name: str, event: Event, text: str) -> None:
    account = ACCOUNTANTS.create(name)
    assert any(text in reason for reason in account.supports(Composed((Gaussian(1.0), event))))
    with pytest.raises(UnsupportedEvent, match=f"accountant '{name}' has no valid bound for") as refusal:
        account.compose(SelfComposed(event, 2))
    assert text in str(refusal.value)
    assert account.epsilon(DELTA) == 0.0, "a refused event must leave nothing behind"


def test_every_event_but_nested_samples_and_the_wrong_relation_has_a_price() -> None:
    inner = (Gaussian(3.0), Laplace(3.0), DiscreteGaussian(3.0), Exponential(0.5), RandomizedResponse(0.5, 3))
    for part in (*inner, EpsilonDelta(0.5, 1e-7), Composed((Gaussian(3.0), Laplace(3.0))), NonPrivate()):
        for event in (
            part,
            PoissonSampled(0.2, part),
            PoissonSampled(0.2, part, "replace"),
            TruncatedPoisson(0.2, 90, 99, part),
            FixedSizeSampled(2, 10, part),
            BallsInBins(3, 2, part),
            BallsInBins(3, 2, part, "replace"),
        ):
            assert any(not ACCOUNTANTS.create(name).supports(event) for name in NAMES), event


def test_a_sample_of_a_poisson_sample_is_a_smaller_one() -> None:
    for relation in ("add_or_remove", "replace"):
        twice = PoissonSampled(0.5, PoissonSampled(0.25, Gaussian(2.0), relation), relation)
        once = PoissonSampled(0.125, Gaussian(2.0), relation)
        spent = [ACCOUNTANTS.create("pld").compose(event, 9).epsilon(DELTA) for event in (twice, once)]
        ((joint, count),) = equal(twice)
        assert count == 1
        assert math.nextafter(0.125, 1.0) == joint.sampling_probability  # never below the product
        # the prices differ by less than the sums' rounding, which the accountant's own margin of 2**-36 covers
        assert spent[1] / (1 + 2**-36) <= spent[0] <= spent[1] * (1 + 1e-9)
    mixed = PoissonSampled(0.5, PoissonSampled(0.25, Gaussian(2.0), "replace"))
    assert ACCOUNTANTS.create("pld").supports(mixed)


def test_one_account_holds_one_relation() -> None:
    account = ACCOUNTANTS.create("rdp").compose(STEP)
    with pytest.raises(UnsupportedEvent, match="one neighbouring relation, got replace after add_or_remove"):
        account.compose(FixedSizeSampled(1, 10, Gaussian(1.0)))
    assert ACCOUNTANTS.create("rdp").supports(Composed((STEP, FixedSizeSampled(1, 10, Gaussian(1.0)))))


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_refused(name: str) -> None:
    account = ACCOUNTANTS.create(name).compose(Gaussian(1.0))
    for delta in (-1e-5, 1.0, math.nan):
        with pytest.raises(PrivacyParameterError, match=r"delta must be in \[0, 1\)"):
            account.epsilon(delta)
    with pytest.raises(PrivacyParameterError, match="epsilon must be a finite number >= 0"):
        account.delta(-1.0)
    with pytest.raises(PrivacyParameterError, match="count must be an integer >= 1"):
        account.compose(Gaussian(1.0), 0)
    with pytest.raises(PrivacyParameterError, match="composes events of dpfa_core"):
        account.compose("gaussian")
