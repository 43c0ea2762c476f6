"""A threshold that follows a quantile: what it costs, which noise it gets, and that the event stays as it was."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Gaussian, PoissonSampled
from dpfa_training import (
    QuantileClipping,
    TrainingPlan,
    engine_of,
    load_checkpoint,
    make_private,
    make_private_with_epsilon,
    save_checkpoint,
)
from dpfa_training.adaptive_clipping import COUNT, COUNT_PARAMETER, WIDEST, MovingThreshold

CRITERION = nn.CrossEntropyLoss()


def plan(**options):
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "population": 1000, "expected_batch_size": 100}
    return TrainingPlan(**settings | {"clipping": QuantileClipping()} | options)


def private(rows=40, **options):
    torch.manual_seed(0)
    module = TinyViT()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 3, "clipping": QuantileClipping()}
    return make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images(rows)), batch_size=8),
        **settings | options,
    )


def run(module, optimizer, loader, stop=None):
    thresholds = []
    for count, (x, y) in enumerate(loader, start=1):
        CRITERION(module(x), y).backward()
        optimizer.step()
        thresholds.append(engine_of(module).clip_norm)
        if count == stop:
            break
    return thresholds


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size", "balls_in_bins"])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 17.0])
@pytest.mark.parametrize("count_noise_std", [None, 20.0])
def test_gradients_and_count_together_are_one_gaussian_release_of_the_plans_noise(
    sampling, noise_multiplier, count_noise_std
):
    clipping = QuantileClipping(count_noise_std=count_noise_std)
    found = plan(noise_multiplier=noise_multiplier, sampling=sampling, clipping=clipping)
    times = 2 if sampling == "fixed_size" else 1
    gradients = Fraction(found.noise_std_at(0.7)) / (times * Fraction(0.7))
    count = Fraction(found.count_noise_std) / Fraction(times, 2)
    joint = gradients**-2 + count**-2
    assert joint <= Fraction(noise_multiplier) ** -2
    assert joint >= Fraction(noise_multiplier) ** -2 * (1 - Fraction(1, 2**40))
    assert found.event() == plan(noise_multiplier=noise_multiplier, sampling=sampling, clipping="flat").event()


def test_one_record_moves_the_centred_count_by_a_half_and_a_replaced_one_by_one():
    threshold = MovingThreshold(1.0, QuantileClipping(), 10)
    norms = torch.tensor([0.5, 1.0, 1.0001, math.inf, math.nan])
    each = [float(threshold.centred_count(norms, one)) for one in torch.eye(5)]
    assert each == [0.5, 0.5, -0.5, -0.5, -0.5]
    assert float(threshold.centred_count(norms, torch.zeros(5))) == 0.0
    users = torch.tensor([0, 0, 1, 2, 3, 4])
    assert float(threshold.centred_count(norms, torch.tensor([1.0, 1, 1, 0, 0, 0]), users)) == 1.0


def test_a_count_that_costs_as_much_as_the_step_is_refused():
    with pytest.raises(PrivacyParameterError, match=r"count_noise_std must exceed 0\.5"):
        plan(clipping=QuantileClipping(count_noise_std=0.5))
    with pytest.raises(PrivacyParameterError, match="must exceed 1"):
        plan(clipping=QuantileClipping(count_noise_std=0.6), sampling="fixed_size")
    plan(clipping=QuantileClipping(count_noise_std=0.6))
    with pytest.raises(PrivacyParameterError, match="count_noise_std must be a finite number > 0"):
        QuantileClipping(count_noise_std=0)


def test_the_threshold_finds_the_quantile_and_stays_in_its_range():
    norms, everyone = torch.rand(1000, generator=torch.Generator().manual_seed(1)), torch.ones(1000)
    threshold = MovingThreshold(50.0, QuantileClipping(quantile=0.7), 1000)
    for _ in range(200):
        threshold.move(float(threshold.centred_count(norms, everyone)))
    assert threshold.value == pytest.approx(float(norms.quantile(0.7)), rel=0.05)
    for count in (1e30, -1e30):
        threshold.move(count)
        assert threshold.value == pytest.approx(50.0 / WIDEST if count > 0 else 50.0 * WIDEST)


def test_noise_of_the_count_has_bits_of_its_own_and_each_step_the_std_of_its_threshold(monkeypatch):
    module, opt, loader = private()
    engine, calls = engine_of(module), []
    add_noise_ = engine._backend.add_noise_

    def spy(total, std, key, *, parameter, step):
        calls.append((parameter, step, std, float(total.sum()) if parameter == COUNT_PARAMETER else None))
        return add_noise_(total, std, key, parameter=parameter, step=step)

    monkeypatch.setattr(engine._backend, "add_noise_", spy)
    thresholds = [0.5, *run(module, opt, loader)]
    parameters = len(engine.recording.parameters)
    assert len({call[:2] for call in calls}) == len(calls) == (parameters + 1) * engine.steps
    for parameter, step, std, count in calls:
        if parameter == COUNT_PARAMETER:
            assert std == engine.plan.count_noise_std >= 2.5
            assert count * 2 == round(count * 2)
        else:
            assert parameter < parameters
            assert std == engine.plan.noise_std_at(thresholds[step]) > thresholds[step]
    assert len(set(thresholds)) == len(thresholds)
    assert list(engine.ledger.events()) == [(PoissonSampled(0.2, Gaussian(1.0)), engine.steps)]


def test_micro_batches_count_as_one_draw():
    ends = []
    for size in (None, 3):
        module, opt, loader = private(max_physical_batch_size=size)
        run(module, opt, loader)
        ends.append(engine_of(module).clip_norm)
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_the_threshold_moves_with_a_step_only_and_by_the_norms_of_its_draw():
    module, opt, loader = private(noise_multiplier=0, clipping=QuantileClipping(learning_rate=1.0))
    engine = engine_of(module)
    for x, y in loader:
        before = engine.clip_norm
        CRITERION(module(x), y).backward()
        assert engine.clip_norm == before
        below = float(engine._sums[COUNT]) / 8 + 0.5
        opt.step()
        assert engine.clip_norm == pytest.approx(before * math.exp(0.5 - below))


def test_a_resumed_run_has_the_threshold_and_the_count_of_the_uninterrupted_one(tmp_path):
    whole = private(max_physical_batch_size=3)
    run(*whole)
    first = private(max_physical_batch_size=3)
    engine, rows = engine_of(first[0]), iter(first[2])
    for _ in range(4):
        x, y = next(rows)
        CRITERION(first[0](x), y).backward()
        first[1].step()
    assert engine.in_draw
    save_checkpoint(tmp_path / "run", engine, engine.draws)
    second = private(max_physical_batch_size=3, ledger=engine.ledger)
    resumed = engine_of(second[0])
    load_checkpoint(tmp_path / "run", resumed, resumed.draws)
    run(*second)
    assert resumed.clip_norm == engine_of(whole[0]).clip_norm
    assert torch.equal(second[0].head.weight, whole[0].head.weight)


def test_noise_is_calibrated_for_the_same_event_as_without_adaption():
    module = TinyViT()
    module, *_ = make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images(40)), batch_size=40),
        target_epsilon=2.0,
        target_delta=1e-3,
        epochs=3,
        max_grad_norm=0.5,
        clipping=QuantileClipping(count_noise_std=3.0),
    )
    found = engine_of(module).plan
    assert found.gradient_noise_multiplier > found.noise_multiplier > 0
    assert found.clipping == QuantileClipping(count_noise_std=3.0)


def test_a_user_counts_once_however_many_records_it_has():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    module, opt, loader = make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images(40)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1e3,
        clipping=QuantileClipping(),
        unit="user",
        user_ids=[index % 8 for index in range(40)],
        seed=3,
    )
    engine, seen = engine_of(module), set()
    for x, y in loader.draws(6):
        CRITERION(module(x), y).backward()
        count, rows = float(engine._sums[COUNT]), int(engine._batch.weights.sum())
        assert count == rows / 5 / 2  # all norms lie below the threshold
        seen.add(rows)
        opt.step()
    assert len(seen) > 2
