"""The accounting names of the front door: privacy, amplification, advanced_research_mechanisms."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from dp_flash_attention.advanced_research_mechanisms import (
    AttentionSensitivityAnalyzer,
    CompositionAnalyzer,
    PrivacyLossDistribution,
)
from dp_flash_attention.amplification import SubsamplingAmplification
from dp_flash_attention.privacy import RenyiAccountant
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import DiscreteGaussian, Gaussian, Laplace, PoissonSampled, SelfComposed
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.sensitivity import sensitivity


def sampled_gaussian(q: float, z: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    return dp_accounting.SelfComposedDpEvent(step, steps)


def test_these_modules_need_no_torch_cuda_or_transformers() -> None:
    code = (
        "import sys\nfrom dp_flash_attention import advanced_research_mechanisms, privacy, amplification\n"
        "assert not {'torch', 'triton', 'transformers', 'dp_accounting', 'prv_accountant'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gaussian_steps_cost_what_another_librarys_renyi_accountant_says_and_not_less() -> None:
    book = RenyiAccountant()
    for _ in range(300):
        book.add_step(sampling_rate=0.02, noise_multiplier=0.9)
    theirs = rdp.RdpAccountant().compose(sampled_gaussian(0.02, 0.9, 300)).get_epsilon(1e-5)
    assert theirs <= book.get_epsilon(delta=1e-5) <= theirs * (1 + 1e-6)
    assert book.notes == ()


def test_epsilon_never_falls_as_steps_of_any_kind_are_added_or_delta_shrinks() -> None:
    book, before = RenyiAccountant(), 0.0
    for turn in range(12):
        if turn % 3:
            book.add_step(0.1, 1e-8, 0.1)
        else:
            book.add_step(noise_multiplier=3.0)
        found = book.get_epsilon(1e-5)
        assert found >= before
        before = found
    answers = [book.get_epsilon(delta) for delta in (1e-3, 1e-5, 1e-6)]
    assert answers == sorted(answers)


def test_black_boxes_are_amplified_and_composed_and_said_to_be_looser() -> None:
    book = RenyiAccountant()
    for _ in range(50):
        book.add_step(0.5, 0.0, 0.1)
    assert book.get_epsilon(1e-5) == SubsamplingAmplification(0.5, 0.1, 50).compute_epsilon(1e-5)
    assert "which is looser than pricing the mechanism itself" in book.describe(1e-5)
    assert "50 black boxes" in book.describe(1e-5)


def test_both_kinds_together_cost_more_than_each_and_at_most_both_added() -> None:
    boxes, gaussians, both = RenyiAccountant(), RenyiAccountant(), RenyiAccountant()
    for book in (boxes, both):
        for _ in range(20):
            book.add_step(0.2, 1e-9)
    for book in (gaussians, both):
        for _ in range(20):
            book.add_step(noise_multiplier=8.0)
    found = both.get_epsilon(1e-5)
    assert max(boxes.get_epsilon(1e-5), gaussians.get_epsilon(1e-5)) < found
    assert found <= boxes.get_epsilon(5e-6) + gaussians.get_epsilon(5e-6)
    # Laplace is one of the boxes that the numbers allow, and its loss is known
    true = pld.PLDAccountant()
    true.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.LaplaceDpEvent(5.0), 20))
    true.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(8.0), 20))
    assert found > true.get_epsilon(1e-5)


def test_deltas_of_black_boxes_at_or_above_the_target_leave_no_epsilon() -> None:
    book = RenyiAccountant()
    book.add_step(0.5, 1e-5)
    assert book.get_epsilon(1e-5) == math.inf
    assert book.get_epsilon(1.1e-5) < math.inf


class Spent(dict[str, float]):
    """A report of spending: a dict that is a number and knows its last event."""

    def __init__(self, event_id: str, epsilon: float) -> None:
        super().__init__(total_delta=1e-7)
        self.event_id, self._epsilon = event_id, epsilon

    def __float__(self) -> float:
        return self._epsilon


def test_an_event_given_twice_is_counted_once_and_must_not_change() -> None:
    once, twice = RenyiAccountant(), RenyiAccountant()
    once.add_step(Spent("a", 0.5))
    for _ in range(3):
        twice.add_step(Spent("a", 0.5))
    assert twice.get_epsilon(1e-5) == once.get_epsilon(1e-5)
    assert any("counted once" in note for note in twice.notes)
    twice.add_step(Spent("b", 0.5))
    assert twice.get_epsilon(1e-5) > once.get_epsilon(1e-5)
    with pytest.raises(PrivacyParameterError, match="event 'a' must cost the same each time"):
        twice.add_step(Spent("a", 0.7))


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0.0, 1e-6), {}, "epsilon must be a finite number > 0, got 0.0"),
        ((math.nan, 1e-6), {}, "epsilon must be a finite number > 0, got nan"),
        ((1.0, 1.0), {}, r"delta must be in \[0, 1\), got 1.0"),
        ((1.0,), {}, "delta must be given beside epsilon, got None. Use 0.0 for a pure release."),
        ((1.0, 1e-6, 1.5), {}, r"sampling_rate must be in \(0, 1\], got 1.5"),
        ((), {}, "a step must have an epsilon or a noise_multiplier, got None"),
        ((), {"noise_multiplier": 0.0}, "noise_multiplier must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_steps_are_refused_and_add_nothing(arguments, options, text) -> None:
    book = RenyiAccountant()
    with pytest.raises(PrivacyParameterError, match=text):
        book.add_step(*arguments, **options)
    assert book.get_epsilon(1e-5) == 0.0
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(PrivacyParameterError, match=r"delta must be in \(0, 1\)"):
            book.get_epsilon(delta)


def test_loss_distribution_equals_another_librarys() -> None:
    theirs = pld.PLDAccountant().compose(sampled_gaussian(0.02, 0.9, 300)).get_epsilon(1e-5)
    ours = PrivacyLossDistribution.from_noise_multiplier(0.9, steps=300, sampling_probability=0.02, delta=1e-5)
    epsilon, delta = ours.compose()
    assert delta == 1e-5
    assert epsilon == pytest.approx(theirs, rel=1e-4)
    assert ours._advanced_composition() == (epsilon, delta)


def test_composed_distributions_are_the_distribution_of_all_events() -> None:
    one, two = PrivacyLossDistribution(Gaussian(4.0)), PrivacyLossDistribution([(Laplace(5.0), 3), Gaussian(9.0)])
    both = PrivacyLossDistribution([Gaussian(4.0), (Laplace(5.0), 3), Gaussian(9.0)])
    assert one.compose_with(two).compose() == two.compose_with(one).compose() == both.compose()
    with pytest.raises(PrivacyParameterError, match="both distributions must have the same delta"):
        one.compose_with(PrivacyLossDistribution(Gaussian(1.0), 1e-6))
    for bad, text in (((), "expected at least one event"), ([3.0], "expected events of dpfa_core.events")):
        with pytest.raises(PrivacyParameterError, match=text):
            PrivacyLossDistribution(bad)


def test_heads_bounds_compose_to_the_whole_bound_and_are_json() -> None:
    problem = AttentionProblem(
        batch=2, q_len=32, kv_len=32, q_heads=4, kv_heads=2, head_dim=8, causal=True, clip_norm=1.0, logit_bound=0.5
    )
    spec = PrivacySpec(epsilon=1.0, delta=1e-6, unit="token", queries="private")
    found = AttentionSensitivityAnalyzer(spec, problem).analyze()
    assert found["tight"] == sensitivity(spec, problem).value
    assert found["ratio"] == found["naive"] / found["tight"] > 1
    heads = found["per_head"]
    assert math.sqrt(sum(head["tight"] ** 2 for head in heads)) == pytest.approx(found["tight"], rel=1e-6)
    assert [head["kv_head"] for head in heads] == [0, 0, 1, 1]
    assert all(0 < head["key_value"] <= head["query_key_value"] for head in heads)
    assert all(max(head["query"], head["key"], head["value"]) <= head["query_key_value"] for head in heads)
    assert all(head["key"] < head["value"] == head["key_value"] for head in heads)
    json.dumps(found, allow_nan=False)


def test_every_method_is_listed_with_its_worth_and_the_estimate_is_no_bound() -> None:
    rows = {
        row.method: row
        for row in CompositionAnalyzer(SelfComposed(PoissonSampled(0.01, Gaussian(0.6)), 200)).analyze(1e-5)
    }
    assert {"rdp", "pld", "prv", "gdp", "basic composition", "advanced composition", "central limit"} <= set(rows)
    bounds = [row.epsilon for row in rows.values() if row.is_upper_bound]
    assert bounds == sorted(bounds)
    assert rows["pld"].epsilon < rows["rdp"].epsilon < rows["basic composition"].epsilon
    assert rows["gdp"].epsilon is None
    assert "central-limit" in rows["gdp"].note
    # it lies below the least true bound there is
    assert not rows["central limit"].is_upper_bound
    assert rows["central limit"].epsilon < rows["pld"].epsilon * 0.9


def test_advanced_composition_beats_basic_only_for_many_small_releases() -> None:
    many = {row.method: row.epsilon for row in CompositionAnalyzer([(Laplace(100.0), 10_000)]).analyze(1e-5)}
    few = {row.method: row.epsilon for row in CompositionAnalyzer([(Laplace(1.0), 3)]).analyze(1e-5)}
    assert many["pld"] < many["advanced composition"] < many["basic composition"]
    assert few["basic composition"] < few["advanced composition"]
    table = CompositionAnalyzer(Gaussian(1.0)).table(1e-5)
    assert "| gdp | 4.378 | yes |" in table
    assert CompositionAnalyzer(DiscreteGaussian(2.0)).analyze(1e-5)


def test_equal_numbers_without_an_event_are_different_steps() -> None:
    book = RenyiAccountant()
    with pytest.raises(PrivacyParameterError, match="epsilon must be a number or have float"):
        book.add_step(object(), 0.0)
    for _ in range(2):
        book.add_step(0.1, 0.0)
    assert book.get_epsilon(1e-9) == pytest.approx(0.2, rel=1e-6)
