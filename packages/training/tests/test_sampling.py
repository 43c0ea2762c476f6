import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.plan import TrainingPlan
from dpfa_training.sampling import PoissonLoader, PoissonSampler, uniform_words


def plan(population=1000, batch=100, **options):
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | options
    return TrainingPlan(population=population, expected_batch_size=batch, **settings)


def drawn(sampler):
    return [i for part in sampler.draw() for i, w in zip(part.indices, part.weights, strict=True) if w]


def test_each_record_takes_part_independently_with_the_stated_probability():
    sampler = PoissonSampler(plan(), KeySource(1, generator="chacha20"), None)
    counts, sizes = np.zeros(1000), []
    for _ in range(400):
        indices = drawn(sampler)
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


def test_a_probability_of_one_takes_every_record():
    sampler = PoissonSampler(plan(5, 5), KeySource(1, generator="chacha20"), None)
    assert drawn(sampler) == [0, 1, 2, 3, 4]


def test_draws_of_one_key_differ_and_of_one_seed_agree():
    keys = KeySource(7, generator="chacha20")
    first, second = uniform_words(keys, 0, 100), uniform_words(keys, 1, 100)
    assert len(set(first) & set(second)) == 0
    assert np.array_equal(first, uniform_words(KeySource(7, generator="chacha20"), 0, 100))
    assert not np.array_equal(first, uniform_words(KeySource(), 0, 100))


def test_parts_of_a_draw_hold_every_record_once_and_end_with_the_last():
    whole = PoissonSampler(plan(), KeySource(1, generator="chacha20"), None)
    parts = PoissonSampler(plan(), KeySource(1, generator="chacha20"), 32)
    for _ in range(5):
        batches = parts.draw()
        indices = [i for b in batches for i, w in zip(b.indices, b.weights, strict=True) if w]
        assert indices == drawn(whole)
        assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]
        assert max(len(b.indices) for b in batches) <= 32


def test_an_empty_draw_is_two_rows_of_weight_zero():
    sampler = PoissonSampler(plan(10**6, 1), KeySource(2, generator="chacha20"), None)
    empty = [b for _ in range(20) for b in sampler.draw() if not b.weights.any()]
    assert empty
    assert all(len(b.indices) == 2 and b.last for b in empty)


@pytest.mark.parametrize("workers", [0, 2])
def test_announcements_come_in_the_order_of_the_rows(workers):
    data = DataLoader(TensorDataset(torch.arange(100)), batch_size=10, num_workers=workers)
    seen = []
    sampler = PoissonSampler(plan(100, 10), KeySource(3, generator="chacha20"), 4)
    loader = PoissonLoader(data, sampler, seen.append)
    for count, (rows,) in enumerate(loader, start=1):
        assert tuple(rows.tolist()) == seen[-1].indices
        assert len(seen) == count
    assert len({batch.draw for batch in seen}) == len(loader) == 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a finite number >= 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number > 0"),
        ({"sampling": "shuffle"}, "sampling must be one of"),
        ({"clipping": "per_layer"}, "clipping must be one of 'flat'"),
        ({"reduction": "none"}, "reduction must be one of"),
    ],
)
def test_bad_plans_are_refused(options, text):
    with pytest.raises(PrivacyParameterError, match=text):
        plan(**options)


def test_plan_round_trips_through_json():
    assert TrainingPlan.from_json(plan().to_json()) == plan()
