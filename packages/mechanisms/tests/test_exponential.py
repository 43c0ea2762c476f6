"""Exact coins, the law of a selection, and what it costs; all bits are fixed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
from scipy.stats import chi2

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Exponential as ExponentialEvent
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.bernoulli import bernoulli, bernoulli_exp, uniform_below
from dpfa_mechanisms.exponential import Exponential
from dpfa_mechanisms.integer_gaussian import integer_gaussian, integer_laplace

RANDOM_BITS = Callable[[int], bytes]


def bits(seed: int) -> RANDOM_BITS:
    return random.Random(seed).randbytes


def follows(draw: Callable[[], int], law: dict[int, float], count: int = 4000) -> bool:
    """Chi-square at 1e-6; what lies outside the keys of `law` is one more class."""
    seen = Counter(draw() for _ in range(count))
    expected = [count * share for share in law.values()]
    found = [seen[key] for key in law]
    rest = 1.0 - sum(law.values())
    if rest > 1e-9:
        expected.append(count * rest)
        found.append(count - sum(found))
    elif sum(found) != count:
        return False
    distance = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    return len(expected) == 1 or bool(distance < chi2.isf(1e-6, len(expected) - 1))


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 256, 257])
def test_dice_are_uniform(bound: int) -> None:
    source = bits(bound)
    assert follows(lambda: uniform_below(bound, source), dict.fromkeys(range(bound), 1 / bound))


@pytest.mark.parametrize("probability", [Fraction(0), Fraction(1), Fraction(1, 3), Fraction(0.1)])
def test_coins_have_their_probability(probability: Fraction) -> None:
    source = bits(1)
    law = {1: float(probability), 0: 1.0 - float(probability)}
    assert follows(lambda: bernoulli(probability, source), {key: share for key, share in law.items() if share})


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(1, 4), Fraction(1), Fraction(7, 4), Fraction(3.3)])
def test_exponential_coins_have_their_probability(exponent: Fraction) -> None:
    source = bits(2)
    law = {1: math.exp(-exponent), 0: 1.0 - math.exp(-exponent)}
    assert follows(lambda: bernoulli_exp(exponent, source), {key: share for key, share in law.items() if share})


@pytest.mark.parametrize("variance", [Fraction(1, 50), Fraction(1), Fraction(2.5) ** 2])
def test_integer_noise_has_the_law_of_the_discrete_gaussian(variance: Fraction) -> None:
    source = bits(3)
    reach = range(-60, 61)
    weights = {k: math.exp(-k * k / (2 * float(variance))) for k in reach}
    whole = sum(weights.values())
    law = {k: weight / whole for k, weight in weights.items() if 3000 * weight / whole > 5}
    assert follows(lambda: integer_gaussian(variance, source), law, 3000)


@pytest.mark.parametrize("scale", [1, 3])
def test_integer_noise_has_the_law_of_the_discrete_laplace(scale: int) -> None:
    source = bits(4)
    law = {k: math.tanh(0.5 / scale) * math.exp(-abs(k) / scale) for k in range(-3 * scale, 3 * scale + 1)}
    assert follows(lambda: integer_laplace(scale, source), law, 3000)


@pytest.mark.parametrize(
    ("scores", "sensitivity", "epsilon"),
    [
        ((0.0, 1.0, 2.0), 1.0, 1.0),
        ((5.0,), 1.0, 1.0),
        ((-3.0, -3.0, -3.5, -1.0), 0.5, 0.7),
        ((Fraction(1, 3), Fraction(2, 3), 0), Fraction(1, 7), 0.3),
        ((1e300, 0.0), 1.0, 2.0),
    ],
)
def test_a_selection_has_its_law(scores: Sequence[Any], sensitivity: Any, epsilon: float) -> None:
    source = bits(5)
    best = max(scores)
    weights = [math.exp(-epsilon * float(best - score) / (2 * float(sensitivity))) for score in scores]
    law = {k: weight / sum(weights) for k, weight in enumerate(weights) if weight > 1e-3}
    assert follows(lambda: Exponential().select(scores, sensitivity, epsilon, source), law)


def test_bits_are_all_that_a_selection_depends_on() -> None:
    picks = [[Exponential().select((0.0, 1.0, 2.0, 1.0), 1.0, 1.0, bits(seed)) for seed in range(30)] for _ in "ab"]
    assert picks[0] == picks[1]
    assert len(set(picks[0])) == 4


def test_calibration_and_price_are_pure() -> None:
    for epsilon in (0.01, 0.3, 1.0, 7.0):
        multiplier = Exponential().calibrate(epsilon, 0.0)
        assert Fraction(multiplier) * Fraction(epsilon) >= 1
        event = Exponential().event(multiplier)
        assert isinstance(event, ExponentialEvent)
        assert Fraction(event.epsilon) * Fraction(multiplier) >= 1
        assert event.epsilon == pytest.approx(epsilon, rel=1e-12)
    assert Exponential().calibrate(1.0, 1e-5) == Exponential().calibrate(1.0, 0.0)


def test_it_releases_no_attention() -> None:
    case = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1, clip_norm=1.0)
    (reason,) = Exponential().supports(PrivacySpec(epsilon=1.0, delta=0.0, unit="sequence"), case)
    assert "no attention" in reason


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Exponential().select((), 1.0, 1.0, bits(0)), "scores must hold at least one number"),
        (lambda: Exponential().select((math.nan,), 1.0, 1.0, bits(0)), "each of scores must be a finite number"),
        (lambda: Exponential().select((0.0, -math.inf), 1.0, 1.0, bits(0)), "each of scores must be a finite number"),
        (lambda: Exponential().select((0.0, 1.0), 0.0, 1.0, bits(0)), "sensitivity must be a finite number > 0"),
        (lambda: Exponential().select((0.0, 1.0), 1.0, math.inf, bits(0)), "epsilon must be a finite number > 0"),
        (
            lambda: Exponential().select((0.0, 1.0), 1.0, 1.0, lambda count: b""),
            r"random_bits\(1\) must return 1 bytes",
        ),
        (lambda: Exponential().calibrate(math.inf, 0.0), "epsilon must be a finite number > 0"),
        (lambda: Exponential().calibrate(5e-324, 0.0), "epsilon must not be below the normal numbers"),
        (lambda: Exponential().calibrate(1.0, 1.0), r"delta must be in \[0, 1\)"),
        (lambda: Exponential().event(0.0), "noise_multiplier must be a finite number > 0"),
        (lambda: uniform_below(0, bits(0)), "bound must be an integer >= 1"),
        (lambda: bernoulli(Fraction(3, 2), bits(0)), r"probability must be in \[0, 1\]"),
        (lambda: bernoulli_exp(Fraction(-1), bits(0)), "exponent must be >= 0"),
        (lambda: integer_gaussian(Fraction(0), bits(0)), "variance must be > 0"),
    ],
)
def test_bad_values_are_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(PrivacyParameterError, match=sentence):
        call()
