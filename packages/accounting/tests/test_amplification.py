from __future__ import annotations

import math

import pytest

from dpfa_accounting.amplification import SubsamplingAmplification, amplified
from dpfa_accounting.optimal_composition import OptimalComposition
from dpfa_accounting.pld import PldAccountant
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import EpsilonDelta, Laplace, PoissonSampled


@pytest.mark.parametrize(("epsilon", "q", "steps"), [(1.0, 0.1, 50), (0.3, 0.5, 10), (2.0, 0.01, 1000)])
def test_it_upper_bounds_the_exact_loss_of_sampled_laplace(epsilon: float, q: float, steps: int) -> None:
    exact = PldAccountant().compose(PoissonSampled(q, Laplace(1.0 / epsilon)), steps)
    bound = SubsamplingAmplification(epsilon, q, steps)
    for delta in (1e-7, 1e-5, 1e-3):
        assert bound.compute_epsilon(delta) >= exact.epsilon(delta) * (1 - 1e-6)


@pytest.mark.parametrize(("epsilon", "q"), [(0.1, 0.01), (1.0, 0.3), (5.0, 0.9), (40.0, 1e-6)])
def test_one_step_of_sampled_randomised_response_attains_it(epsilon: float, q: float) -> None:
    """Answers of the removed record: yes with p = e / (1 + e) against 1 - p without it."""
    p = 1 / (1 + math.exp(-epsilon))
    largest = math.log((1 - q) + q * p / (1 - p)) if p < 1 else math.log1p(q * math.expm1(epsilon))
    found = amplified(epsilon, 0.0, q).epsilon
    assert largest * (1 - 1e-12) <= found <= largest * (1 + 1e-9)


def test_a_sample_of_everybody_is_plain_composition() -> None:
    plain = OptimalComposition([(EpsilonDelta(0.2, 1e-9), 40)])
    assert SubsamplingAmplification(0.2, 1.0, 40, base_delta=1e-9).compute_epsilon(1e-5) == plain.epsilon(1e-5)
    assert SubsamplingAmplification(0.2, 1.0, 40, relation="replace").compute_epsilon(1e-5) <= plain.epsilon(1e-5)


def test_a_known_gaussian_costs_less_than_the_black_box_and_names_its_accountant() -> None:
    # a Gaussian of multiplier 2 is (2.5, 1.1e-6)-private and better on the whole data
    box = SubsamplingAmplification(2.5, 0.02, 200, base_delta=1.1e-6)
    known = SubsamplingAmplification(2.5, 0.02, 200, base_delta=1.1e-6, noise_multiplier=2.0)
    assert known.compute_epsilon(1e-5) < box.compute_epsilon(1e-5)
    assert "priced by pld" in known.method
    assert "Balle-Barthe-Gaboardi" in box.method


def test_deltas_of_the_steps_above_the_target_leave_no_epsilon() -> None:
    assert SubsamplingAmplification(1.0, 0.5, 100, base_delta=1e-6).compute_epsilon(4e-5) == math.inf
    assert SubsamplingAmplification(1.0, 0.5, 100, base_delta=1e-6).compute_epsilon(1e-4) < math.inf


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0.0, 0.1, 10), {}, "base_epsilon must be a finite number > 0, got 0.0"),
        ((math.nan, 0.1, 10), {}, "base_epsilon must be a finite number > 0, got nan"),
        ((1.0, 1.5, 10), {}, r"sampling_rate must be in \(0, 1\], got 1.5"),
        ((1.0, 0.0, 10), {}, r"sampling_rate must be in \(0, 1\], got 0.0"),
        ((1.0, 0.1, 0), {}, "num_steps must be an integer >= 1, got 0"),
        ((1.0, 0.1, 10), {"base_delta": 1.0}, r"base_delta must be in \[0, 1\), got 1.0"),
        ((1.0, 0.1, 10), {"noise_multiplier": -1.0}, "noise_multiplier must be a finite number > 0, got -1.0"),
        ((1.0, 0.1, 10), {"relation": "swap"}, "relation must be one of 'add_or_remove', 'replace', got 'swap'"),
        ((1.0, 0.1, 10), {"relation": "replace", "noise_multiplier": 1.0}, "compose FixedSizeSampled events"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(
    arguments: tuple[float, float, int], options: dict, text: str
) -> None:  # type: ignore[type-arg]
    with pytest.raises(PrivacyParameterError, match=text):
        SubsamplingAmplification(*arguments, **options)


@pytest.mark.parametrize("delta", [0.0, 1.0, 1.5, math.nan])
def test_delta_must_lie_inside_its_range(delta: float) -> None:
    with pytest.raises(PrivacyParameterError, match=r"delta must be in \(0, 1\)"):
        SubsamplingAmplification(1.0, 0.1, 10).compute_epsilon(delta)
