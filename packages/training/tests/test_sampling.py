"""Who takes part: the law of each sampler, and what it costs."""

import math
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
import torch

from dpfa_core.errors import DPFAError, PrivacyParameterError
from dpfa_core.events import BallsInBins, FixedSizeSampled, Gaussian, NonPrivate, PoissonSampled, TruncatedPoisson
from dpfa_core.spending import spending
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.plan import PRIVATE_SAMPLINGS, TrainingPlan
from dpfa_training.sampling import Draws
from dpfa_training.sampling.secret_bits import uniform_below, uniform_subset, uniform_words

KEYS = KeySource(1, generator="chacha20")


def plan(population=1000, batch=100, sampling="poisson", **options):
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | options
    if sampling == "truncated_poisson":
        settings.setdefault("max_batch", 2 * batch)
    return TrainingPlan(population=population, expected_batch_size=batch, sampling=sampling, **settings)


def draws(max_rows=None, keys=KEYS, **options):
    return Draws(plan(**options).sampler(), keys, max_rows)


def rows(batches):
    return [i for part in batches for i, w in zip(part.indices, part.weights, strict=True) if w]


# ---- Poisson


def test_each_record_takes_part_independently_with_the_stated_probability():
    sampler = plan().sampler()
    counts, sizes = np.zeros(1000), []
    for draw in range(400):
        indices = sampler.units(KEYS, draw)
        counts[indices] += 1
        sizes.append(len(indices))
    # chi-square over the records and the variance of the binomial batch size, both at five deviations
    chi = float(((counts - 40) ** 2 / (400 * 0.1 * 0.9)).sum())
    assert abs(chi - 1000) < 5 * math.sqrt(2 * 1000)
    assert abs(np.mean(sizes) - 100) < 5 * math.sqrt(90 / 400)
    assert abs(np.var(sizes) / 90 - 1) < 5 * math.sqrt(2 / 400)


def test_probability_of_record_is_not_rounded_up_and_the_accounted_one_not_down():
    for population, batch in ((3, 1), (7, 3), (60000, 256), (10, 10), (1437, 500)):
        settings = plan(population, batch)
        assert (batch << 64) // population / 2**64 <= settings.sampling_probability <= 1
        assert settings.sampling_probability * population >= batch


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_a_probability_of_one_takes_every_record(sampling):
    assert plan(5, 5, sampling).sampler().units(KEYS, 3).tolist() == [0, 1, 2, 3, 4]


# ---- secret bits


def test_draws_of_one_key_differ_and_of_one_seed_agree():
    keys = KeySource(7, generator="chacha20")
    words = [uniform_words(keys, draw, 100, lane) for draw, lane in ((0, 0), (1, 0), (0, 1), (2**32, 0))]
    assert len(set(np.concatenate(words).tolist())) == 400
    assert np.array_equal(words[0], uniform_words(KeySource(7, generator="chacha20"), 0, 100))
    assert not np.array_equal(words[0], uniform_words(KeySource(), 0, 100))


def test_all_subsets_are_equally_likely():
    found = Counter(tuple(uniform_subset(KEYS, draw, 5, 2)) for draw in range(2000))
    assert set(found) == set(combinations(range(5), 2))
    chi = sum((count - 200) ** 2 / 200 for count in found.values())
    assert chi < 9 + 5 * math.sqrt(2 * 9)


def test_a_tie_at_the_edge_of_a_subset_is_drawn_again(monkeypatch):
    lanes = [np.array([5, 5, 9], dtype=np.uint64), np.array([7, 3, 9], dtype=np.uint64)]
    monkeypatch.setattr("dpfa_training.sampling.secret_bits.uniform_words", lambda keys, draw, count, lane: lanes[lane])
    assert uniform_subset(KEYS, 0, 3, 1).tolist() == [1]


def test_numbers_below_a_bound_are_uniform_and_words_past_its_last_multiple_are_not_used(monkeypatch):
    counts = np.bincount(uniform_below(KEYS, 0, 7000, 7), minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 6 + 5 * math.sqrt(2 * 6)
    lanes = [np.array([2**64 - 1, 4], dtype=np.uint64), np.array([8], dtype=np.uint64)]
    monkeypatch.setattr("dpfa_training.sampling.secret_bits.uniform_words", lambda keys, draw, count, lane: lanes[lane])
    assert uniform_below(KEYS, 0, 2, 7).tolist() == [1, 4]  # 2**64 - 1 is past the last multiple of 7


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_no_sampler_touches_or_follows_a_public_generator(sampling):
    sampler, states = plan(50, 5, sampling).sampler(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    drawn = sampler.units(KEYS, 1).tolist()
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert sampler.units(KEYS, 1).tolist() == drawn


# ---- fixed size, balls in bins, truncated Poisson


def test_fixed_size_draws_hold_exactly_the_batch_and_every_record_equally_often():
    sampler = plan(50, 10, "fixed_size").sampler()
    counts = np.zeros(50)
    for draw in range(300):
        units = sampler.units(KEYS, draw)
        assert len(set(units.tolist())) == 10
        counts[units] += 1
    # each count is Binomial(300, 0.2); their sum is fixed
    assert ((counts - 60) ** 2 / 48).sum() < 50 + 5 * math.sqrt(2 * 50)


def test_every_record_falls_into_exactly_one_batch_of_a_round():
    sampler = plan(100, 9, "balls_in_bins").sampler()
    assert sampler.steps_per_round == sampler.bins == 12
    rounds = []
    for first in (0, 12, 24):
        parts = [sampler.units(KEYS, first + batch).tolist() for batch in range(12)]
        assert sorted(chain(*parts)) == list(range(100))
        rounds.append(parts)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_large_poisson_draw_is_cut_to_a_uniform_part_of_itself():
    whole, cut = plan(30, 10).sampler(), plan(30, 10, "truncated_poisson", max_batch=8).sampler()
    kept, lost = np.zeros(30), 0
    for draw in range(400):
        before, after = whole.units(KEYS, draw).tolist(), cut.units(KEYS, draw).tolist()
        assert set(after) <= set(before)
        assert len(after) == min(len(before), 8)
        lost += len(before) > 8
        kept[after] += 1
    assert lost > 200
    share = kept.sum() / 400 / 30
    assert ((kept - 400 * share) ** 2 / (400 * share * (1 - share))).sum() < 30 + 5 * math.sqrt(2 * 30)


@pytest.mark.parametrize(
    ("sampling", "event"),
    [
        ("poisson", PoissonSampled(0.1, Gaussian(1.5))),
        ("fixed_size", FixedSizeSampled(100, 1000, Gaussian(1.5), "replace")),
        ("balls_in_bins", BallsInBins(10, 1, Gaussian(1.5))),
        ("truncated_poisson", TruncatedPoisson(0.1, 200, 1000, Gaussian(1.5))),
    ],
)
def test_event_relation_and_noise_follow_from_the_sampler_that_runs(sampling, event):
    settings = plan(sampling=sampling, noise_multiplier=1.5, max_grad_norm=0.5)
    assert settings.event() == event
    assert settings.relation == event.relation
    # one unit moves the sum by C, replacing one by 2 C
    sensitivity = 1.0 if event.relation == "replace" else 0.5
    assert settings.noise_std == math.nextafter(1.5 * sensitivity, math.inf)
    assert plan(sampling=sampling, noise_multiplier=0).event() == NonPrivate()
    rounds = 3 if sampling == "balls_in_bins" else 21
    assert settings.charges(21) == rounds
    try:
        price = spending([(settings.total(21), 1)], 1e-5).epsilon
    except DPFAError:
        pytest.skip(f"no accountant here prices {event}")
    assert 0 < price < math.inf


# ---- physical batches


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_parts_of_a_draw_hold_every_record_once_and_end_with_the_last(sampling):
    whole, parts = draws(sampling=sampling), draws(32, sampling=sampling)
    for _ in range(3):
        batches = list(parts.batches(1))
        assert rows(batches) == rows(whole.batches(1))
        assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]
        assert max(len(b.indices) for b in batches) <= 32
        assert [b.start for b in batches] == [32 * i for i in range(len(batches))]
        whole.position += 1
        parts.reached(batches[-1])


def test_fault_the_empty_draw_is_two_rows_of_weight_zero():
    empty = [b for b in draws(population=10**5, batch=1).batches(20) if not b.weights.any()]
    assert empty
    assert all(len(b.indices) == 2 and b.last and b.count == 0 for b in empty)


def test_a_draw_that_was_left_is_never_served_again():
    cut = draws(32)
    first, second, *_ = cut.batches(1)
    cut.reached(first)
    assert next(cut.batches(1)) != first
    assert next(cut.batches(1)).start == second.start
    assert not cut.enter()
    assert next(cut.batches(1)).draw == 1


def test_draws_fetched_by_hand_are_those_of_the_loop():
    by_hand, loop = draws(32), list(draws(32).batches(3))
    found = [part for _ in range(3) for part in by_hand.draw()]
    assert [part.indices for part in found] == [part.indices for part in loop]
    assert by_hand.position == 3


def test_a_new_epoch_of_balls_in_bins_begins_a_new_round():
    cut = draws(sampling="balls_in_bins")
    cut.reached(next(cut.batches(1)))
    assert cut.rest_of_epoch(resumed=False) == 10
    assert [b.draw for b in cut.batches(10)] == list(range(10, 20))
    assert {b.round for b in cut.batches(10)} == {1}
    cut.position = 14
    cut.renew(KeySource())
    assert cut.position == 20


# ---- plans


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a finite number >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number > 0"),
        ({"sampling": "shuffle"}, "sampling must be one of"),
        ({"sampling": "none"}, "wherever noise is added"),
        ({"sampling": "truncated_poisson", "max_batch": None}, "max_batch must be an integer >= 1"),
        ({"max_batch": 5}, "max_batch must be left out"),
        ({"clipping": "per_column"}, "clipping must be one of 'flat'"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"unit": "token"}, "unit must be one of 'example', 'user'"),
        ({"batch": 1001}, "must not exceed the 1000 training records"),
    ],
)
def test_bad_plans_are_refused(options, text):
    with pytest.raises(PrivacyParameterError, match=text):
        plan(**options)


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_plan_round_trips_through_json(sampling):
    assert TrainingPlan.from_json(plan(sampling=sampling).to_json()) == plan(sampling=sampling)


def test_fault_13_steps_of_an_epoch_are_counted_in_whole_numbers():
    assert any(int(1 / (1 / n)) != n for n in range(1, 200))  # what goes wrong with a reciprocal
    for sampling in PRIVATE_SAMPLINGS:
        for n in range(1, 200):
            assert plan(n, 1, sampling).steps_per_epoch == n
    assert plan(1437, 500).steps_per_epoch == 3
