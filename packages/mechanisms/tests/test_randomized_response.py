"""The exact law of an answer, its worst ratio, what is charged and when, and counts that undo the noise."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import mpmath
import pytest
from scipy.stats import chi2

from dpfa_core.errors import BudgetExhausted, PrivacyParameterError
from dpfa_core.events import Event
from dpfa_core.events import RandomizedResponse as RandomizedResponseEvent
from dpfa_mechanisms import randomized_response
from dpfa_mechanisms.randomized_response import RandomizedResponse

ASKED = [1e-9, 0.1, math.log(3), 1.0, 2.0, 8.0, 30.0, 36.0, 50.0, 700.0, 1e300]


def free(event: Event) -> None:
    """Charges nobody."""


def law(made: RandomizedResponse, label: int) -> dict[int, Fraction]:
    """The promised probability of each answer."""
    p, k = made.uniform_probability, made.num_classes
    return {answer: p / k + (1 - p if answer == label else 0) for answer in range(k)}


def worst_ratio_is_within(p: Fraction, k: int, epsilon: float) -> bool:
    """Of two labels' probabilities of one answer, in 60 digits, against e**epsilon; `p` any probability."""
    with mpmath.workdps(60):
        ratio = 1 + k * (1 - p) / p
        return bool(mpmath.mpf(ratio.numerator) / ratio.denominator <= mpmath.exp(mpmath.mpf(epsilon)))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_law_is_exact_by_enumeration(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every coin of 8 bits with every byte of a uniform answer, for every label."""
    monkeypatch.setattr(randomized_response, "BITS", 8)
    made = RandomizedResponse(num_classes=classes, epsilon=1.0)
    # a coin of an even numerator is thrown with fewer bits: the top ones of its byte
    for label in range(classes):
        seen: Counter[int] = Counter()
        for coin, other in itertools.product(range(256), range(0, 256, 256 // (4 * classes))):
            drawn = iter((bytes([coin]), bytes([other])))
            seen[made.respond([label], record=free, random_bits=lambda n, drawn=drawn: next(drawn))[0]] += 1
        total = sum(seen.values())
        assert {answer: Fraction(count, total) for answer, count in seen.items()} == law(made, label)


def test_the_53_bit_coin_turns_at_its_probability() -> None:
    made = RandomizedResponse(num_classes=4, epsilon=2.0)
    p = made.uniform_probability
    bits = (p.denominator - 1).bit_length()
    for value, own in [(0, False), (p.numerator - 1, False), (p.numerator, True), (p.denominator - 1, True)]:
        drawn = iter(((value << (8 * 7 - bits)).to_bytes(7, "little"), bytes([3 << 6])))
        assert made.respond([1], record=free, random_bits=lambda n, drawn=drawn: next(drawn)) == [1 if own else 3]


@pytest.mark.parametrize(("classes", "epsilon"), [(2, 1.0), (3, 0.5), (7, 3.0)])
def test_answers_follow_the_law(classes: int, epsilon: float) -> None:
    made, count = RandomizedResponse(num_classes=classes, epsilon=epsilon), 6000
    answers = made.respond([1] * count, record=free, random_bits=random.Random(classes).randbytes)

    def distance(expected: dict[int, Fraction]) -> float:
        seen = Counter(answers)
        return sum(float((seen[key] - count * share) ** 2 / (count * share)) for key, share in expected.items())

    critical = chi2.isf(1e-6, classes - 1)
    assert distance(law(made, 1)) < critical
    assert distance(law(made, 0)) > critical  # the same test, of another label


@pytest.mark.parametrize("epsilon", ASKED)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_the_worst_ratio_is_e_to_the_epsilon_and_never_above(classes: int, epsilon: float) -> None:
    made = RandomizedResponse(num_classes=classes, epsilon=epsilon)
    p = made.uniform_probability
    assert worst_ratio_is_within(p, classes, epsilon)
    assert worst_ratio_is_within(p, classes, made.epsilon_spent)
    assert made.epsilon_spent <= epsilon
    one, other = law(made, 0), law(made, 1)
    assert max(one[a] / other[a] for a in one) == 1 + classes * (1 - p) / p
    # within rounding: the next smaller multiple would exceed epsilon, but for the slack of 2**-40
    if epsilon <= 36.0:
        assert not worst_ratio_is_within(p - Fraction(1, 2**53), classes, epsilon * (1 - 2.0**-39))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 2.0, 5.0])
def test_a_probability_that_is_rounded_down_fails_the_check(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomized_response, "BITS", 12)
    made = RandomizedResponse(num_classes=4, epsilon=epsilon)
    assert worst_ratio_is_within(made.uniform_probability, 4, epsilon)
    assert not worst_ratio_is_within(made.uniform_probability - Fraction(1, 2**12), 4, epsilon)


@pytest.mark.parametrize("epsilon", ASKED)
def test_the_event_holds_the_very_probability_of_the_coin(epsilon: float) -> None:
    made = RandomizedResponse(num_classes=10, epsilon=epsilon)
    assert isinstance(made.event, RandomizedResponseEvent)
    assert Fraction(made.event.noise_parameter) == made.uniform_probability
    assert made.event.num_buckets == 10
    assert 2**53 % made.uniform_probability.denominator == 0


def test_all_labels_are_charged_once_before_anything_is_drawn() -> None:
    happened: list[Any] = []

    def bits(count: int) -> bytes:
        happened.append("bits")
        return bytes(count)

    made = RandomizedResponse(num_classes=3, epsilon=1.0)
    made.respond([0, 2, 1, 1], record=happened.append, random_bits=bits)
    assert happened[0] == made.event
    assert happened[1:] == ["bits"] * 8  # two for each label, whichever is used


def test_what_cannot_be_charged_is_not_drawn() -> None:
    def refuse(event: Event) -> None:
        raise BudgetExhausted("the budget is spent.")

    def bits(count: int) -> bytes:
        raise AssertionError("bits were drawn")

    with pytest.raises(BudgetExhausted):
        RandomizedResponse(num_classes=3, epsilon=1.0).respond([0], record=refuse, random_bits=bits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "labels must be integers from 0 to 2, got 3."),
        ([0, -1], "labels must be integers from 0 to 2, got -1."),
        ([1.0], "labels must be integers from 0 to 2, got 1.0."),
        ([True], "labels must be integers from 0 to 2, got True."),
        (["1"], "labels must be integers from 0 to 2, got '1'."),
        ([], "labels must hold at least one, got 'none'."),
    ],
)
def test_a_wrong_label_is_refused_before_it_is_charged(labels: Any, message: str) -> None:
    charged: list[Event] = []
    with pytest.raises(PrivacyParameterError) as refusal:
        RandomizedResponse(num_classes=3, epsilon=1.0).respond(labels, record=charged.append)
    assert str(refusal.value) == message
    assert charged == []


@pytest.mark.parametrize(
    ("classes", "epsilon", "message"),
    [
        (1, 1.0, "num_classes must be an integer >= 2, got 1."),
        (2.0, 1.0, "num_classes must be an integer >= 2, got 2.0."),
        (2, 0.0, "epsilon must be a finite number > 0, got 0.0. Without privacy, hand out the labels themselves."),
        (2, math.inf, "epsilon must be a finite number > 0, got inf. Without privacy, hand out the labels themselves."),
        (2, math.nan, "epsilon must be a finite number > 0, got nan. Without privacy, hand out the labels themselves."),
        (2, 1e-17, "epsilon must be large enough for an answer to depend on its label, about 2e-16, got 1e-17."),
    ],
)
def test_wrong_terms_are_refused(classes: Any, epsilon: float, message: str) -> None:
    with pytest.raises(PrivacyParameterError) as refusal:
        RandomizedResponse(num_classes=classes, epsilon=epsilon)
    assert str(refusal.value) == message


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_counts_are_unbiased(epsilon: float) -> None:
    """The expectation over the law, exactly: each answer by its probability."""
    made = RandomizedResponse(num_classes=3, epsilon=epsilon)
    labels, mean, plain = (0, 0, 2), [0.0] * 3, [0.0] * 3
    for answers in itertools.product(range(3), repeat=3):
        share = math.prod(float(law(made, y)[z]) for y, z in zip(labels, answers, strict=True))
        for kind, count in enumerate(made.class_counts(answers)):
            mean[kind] += share * count
            plain[kind] += share * answers.count(kind)
    assert mean == pytest.approx([2, 0, 1], abs=1e-9)
    assert plain != pytest.approx([2, 0, 1], abs=0.1)  # counted without correction
    assert sum(made.class_counts([0, 1, 1])) == pytest.approx(3)


def test_the_transition_is_the_law() -> None:
    made = RandomizedResponse(num_classes=3, epsilon=1.0)
    assert made.transition() == [[float(law(made, y)[z]) for z in range(3)] for y in range(3)]
