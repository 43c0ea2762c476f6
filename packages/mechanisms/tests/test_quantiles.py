"""Quantiles: the law of the cell that is picked, the interval's coverage, and spending that comes first."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from scipy.stats import chi2

from dpfa_core.errors import BudgetExhausted, PrivacyParameterError
from dpfa_core.events import Composed, DiscreteGaussian, Event, Exponential
from dpfa_core.ledger import Ledger
from dpfa_mechanisms.quantiles import noisy_count_quantile, private_quantile


def quiet(event: Event) -> None:
    pass


def quantile(values: Any, share: float = 0.5, **more: Any) -> Any:
    options: dict[str, Any] = {"epsilon": 2.0, "bounds": (0.0, 4.0), "candidates": 5, "record": quiet}
    return private_quantile(values, share, **options | more)


VALUES = (0.2, 0.7, 1.5, 3.9, 3.95)
"""At or below the candidates 0, 1, 2, 3, 4 lie 0, 2, 3, 3, 5 of them."""


@pytest.mark.parametrize(
    ("share", "relation", "sensitivity", "distances"),
    [
        # the median's rank is 2.5: it lies in cell 1, which has the ranks 2 to 3
        (0.5, "replace", 1.0, (0.5, 0.0, 0.5, 0.5)),
        (0.5, "add_or_remove", 0.5, (0.5, 0.0, 0.5, 0.5)),
        (0.9, "replace", 1.0, (2.5, 1.5, 1.5, 0.0)),
        (0.9, "add_or_remove", 0.9, (2.5, 1.5, 1.5, 0.0)),
    ],
)
def test_the_picked_cell_has_its_law(
    share: float, relation: str, sensitivity: float, distances: tuple[float, ...]
) -> None:
    source = random.Random(0).randbytes
    count = 800
    found = Counter(
        quantile(VALUES, share, epsilon=6.0, relation=relation, random_bits=source).value for _ in range(count)
    )
    weights = [math.exp(-3.0 * distance / (2 * sensitivity)) for distance in distances]
    expected = [count * weight / sum(weights) for weight in weights]
    assert set(found) <= {1.0, 2.0, 3.0, 4.0}
    distance = sum((found[k + 1.0] - e) ** 2 / e for k, e in enumerate(expected))
    assert distance < chi2.isf(1e-6, 3)


@pytest.mark.parametrize("relation", ["replace", "add_or_remove"])
def test_no_score_moves_further_than_the_sensitivity(relation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Any], Any]] = []

    def watch(self: Any, scores: Any, sensitivity: Any, epsilon: float, random_bits: Any) -> int:
        seen.append((list(scores), sensitivity))
        return 0

    monkeypatch.setattr("dpfa_mechanisms.exponential.Exponential.select", watch)
    rng, largest = random.Random(8), 0.0
    for _ in range(150):
        values = [rng.choice([-1.0, 0.0, 0.5, 1.0, 1.5, 3.0, 4.0, 9.0, math.nan]) for _ in range(rng.randrange(1, 9))]
        other = values[1:] if relation == "add_or_remove" else [rng.uniform(-1.0, 5.0), *values[1:]]
        share = rng.choice([0.1, 0.5, 0.9])
        seen.clear()
        for data in (values, other):
            quantile(data, share, relation=relation, epsilon=20.0, confidence=0.5)
        for (left, sensitivity), (right, same) in zip(seen[:3], seen[3:], strict=True):
            moved = max(abs(a - b) for a, b in zip(left, right, strict=True))
            assert sensitivity == same
            assert moved <= sensitivity
            largest = max(largest, float(moved / sensitivity))
    assert largest == 1.0


def true_quantile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 60,
        [k / 60 for k in range(60)],
        [0.0] * 30 + [4.0] * 30,
        [9.0] * 60,
    ],
    ids=["one_value", "spread", "two_heaps", "out_of_bounds"],
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_interval_covers(values: list[float], share: float) -> None:
    """At little epsilon, so that the ranks are far off."""
    source, count, confidence = random.Random(1).randbytes, 60, 0.95
    true = min(true_quantile(values, share), 1.0)
    found = [
        quantile(
            values, share, epsilon=0.3, bounds=(0.0, 1.0), candidates=33, confidence=confidence, random_bits=source
        )
        for _ in range(count)
    ]
    covered = sum(result.low <= true <= result.high for result in found) / count
    assert covered >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / count)
    assert all(result.low <= result.value <= result.high for result in found)


def test_much_epsilon_finds_the_quantile_and_a_narrow_interval() -> None:
    rng = random.Random(2)
    values = [rng.lognormvariate(0.0, 1.0) for _ in range(2000)]
    for grid in ("linear", "geometric"):
        found = quantile(
            values, 0.7, epsilon=50.0, bounds=(0.01, 100.0), candidates=2001, grid=grid, random_bits=rng.randbytes
        )
        true = true_quantile(values, 0.7)
        assert found.low < true <= found.high
        assert found.high - found.low < 0.3
        assert abs(found.value - true) < 0.1


def test_ties_do_not_blind_it() -> None:
    found = quantile([1.5] * 1000, epsilon=4.0, candidates=9, random_bits=random.Random(3).randbytes)
    assert found.value == 1.5
    assert (found.low, found.high) == (1.0, 1.5)


def test_not_a_number_and_no_numbers_are_values_like_others() -> None:
    source = random.Random(4).randbytes
    assert quantile([math.nan] * 500 + [math.inf] * 10, random_bits=source).value == 1.0
    for epsilon in (1e-300, 2.0, 1e300):
        found = quantile([], epsilon=epsilon, relation="add_or_remove", random_bits=source)
        assert found.value in (1.0, 2.0, 3.0, 4.0)


def test_spending_comes_first_and_is_returned() -> None:
    recorded: list[Event] = []
    found = quantile(VALUES, record=recorded.append)
    assert recorded == [Composed(found.events)]
    assert found.events == (Exponential(1.0), Exponential(0.5), Exponential(0.5))
    assert found.epsilon == sum(event.epsilon for event in found.events) == 2.0

    def broken(count: int) -> bytes:
        raise OSError("no entropy")

    with pytest.raises(OSError, match="no entropy"):
        quantile(VALUES, record=recorded.append, random_bits=broken)
    assert len(recorded) == 2
    with pytest.raises(OSError, match="no entropy"):
        tracked(record=recorded.append, random_bits=broken)
    assert recorded[2:] == [DiscreteGaussian(2.0)]


def test_nothing_is_drawn_when_the_budget_refuses() -> None:
    def refuse(event: Event) -> None:
        raise BudgetExhausted("no budget.")

    def never(count: int) -> bytes:
        raise AssertionError("drawn without being charged")

    for call in (quantile, lambda values, **more: tracked(**more)):
        with pytest.raises(BudgetExhausted):
            call(VALUES, record=refuse, random_bits=never)


def test_a_ledger_is_charged() -> None:
    ledger = Ledger.memory()
    found = quantile(VALUES, record=ledger)
    steps = tracked(record=ledger, steps=2)
    events = [event for event, count in ledger.events() for _ in range(count)]
    assert events == [Composed(found.events), *steps.events]


def tracked(share: float = 0.5, **more: Any) -> Any:
    options: dict[str, Any] = {
        "batches": [VALUES] * 40,
        "noise_multiplier": 2.0,
        "expected_size": 5.0,
        "initial": 1.0,
        "steps": 40,
        "record": quiet,
        "random_bits": random.Random(5).randbytes,
    }
    options |= more
    return noisy_count_quantile(options.pop("batches"), share, **options)


def test_a_threshold_moves_by_its_rule() -> None:
    """Almost no noise: one step is the formula of Andrew et al. with the true share."""
    found = tracked(0.9, noise_multiplier=0.01, steps=3, learning_rate=0.5)
    expected = [1.0]
    for _ in range(3):
        share = sum(value <= expected[-1] for value in VALUES) / 5
        expected.append(expected[-1] * math.exp(-0.5 * (share - 0.9)))
    assert found.path == pytest.approx(expected)
    assert found.value == found.path[-1]
    assert found.events == (DiscreteGaussian(0.01),) * 3


@pytest.mark.parametrize(("relation", "moves"), [("add_or_remove", 1), ("replace", 2)])
def test_the_noise_of_a_count_has_the_planned_scale(relation: str, moves: int) -> None:
    """One step each; the noise is read off the threshold."""
    source, count = random.Random(6).randbytes, 600
    noise = []
    for _ in range(count):
        path = tracked(steps=1, noise_multiplier=3.0, learning_rate=0.01, relation=relation, random_bits=source).path
        share = 0.5 - math.log(path[1] / path[0]) / 0.01
        noise.append((share - 0.5) * 10.0 - (2 - 3))
    assert all(abs(value - round(value)) < 1e-6 for value in noise)
    assert sum(value**2 for value in noise) / count == pytest.approx((3.0 * moves) ** 2, rel=0.25)


def test_it_settles_at_the_quantile() -> None:
    rng = random.Random(7)
    values = [rng.lognormvariate(0.0, 0.5) for _ in range(500)]
    found = tracked(0.8, batches=[values] * 60, expected_size=500.0, steps=60, initial=0.1, noise_multiplier=4.0)
    assert found.value == pytest.approx(true_quantile(values, 0.8), rel=0.15)


def test_wild_noise_leaves_a_finite_threshold() -> None:
    found = tracked(expected_size=1e-3, noise_multiplier=1e3, steps=40)
    assert all(0.0 < threshold < math.inf for threshold in found.path)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: quantile(VALUES, 0.0), r"quantile must be in \(0, 1\)"),
        (lambda: quantile(VALUES, epsilon=0.0), "epsilon must be a finite number > 0"),
        (lambda: quantile(VALUES, epsilon=5e-324), "epsilon must be a normal number"),
        (lambda: quantile(VALUES, confidence=1.0), r"confidence must be in \(0, 1\)"),
        (lambda: quantile(VALUES, bounds=(1.0, 1.0)), "bounds must be two finite numbers"),
        (lambda: quantile(VALUES, bounds=(1.0, math.inf)), "bounds must be two finite numbers"),
        (lambda: quantile(VALUES, bounds=(1.0, math.nextafter(1.0, 2.0))), "bounds must lie far enough apart"),
        (lambda: quantile(VALUES, candidates=1), "candidates must be an integer >= 2"),
        (lambda: quantile(VALUES, grid="geometric"), "a geometric grid needs bounds > 0"),
        (lambda: quantile(VALUES, grid="log"), "grid must be one of"),
        (lambda: quantile(VALUES, relation="swap"), "relation must be one of"),
        (lambda: tracked(1.0), r"quantile must be in \(0, 1\)"),
        (lambda: tracked(noise_multiplier=0.0), "noise_multiplier must be a finite number > 0"),
        (lambda: tracked(expected_size=0.0), "expected_size must be a finite number > 0"),
        (lambda: tracked(initial=-1.0), "initial must be a finite number > 0"),
        (lambda: tracked(steps=41), "batches must hold 41 batches, got 40"),
        (lambda: tracked(learning_rate=0.0), "learning_rate must be a finite number > 0"),
    ],
)
def test_bad_values_are_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(PrivacyParameterError, match=sentence):
        call()
