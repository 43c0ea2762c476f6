"""``make_private`` as a user calls it: every sampler drawn, noised, divided and charged as one configuration."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_accounting.calibration import calibrate_noise_multiplier
from dpfa_core.errors import BudgetExhausted, LedgerError, NotPrivateError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.ledger import Ledger
from dpfa_core.spending import upper_bound
from dpfa_training import TrainingPlan, engine_of, make_private, make_private_with_epsilon
from dpfa_training.plan import PRIVATE_SAMPLINGS
from dpfa_training.private import attach
from dpfa_training.sampling import MemoryProbe

CRITERION = nn.CrossEntropyLoss()


def options_of(sampling):
    return {"sampling": sampling} | ({"max_batch": 12} if sampling == "truncated_poisson" else {})


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def private(module=None, data=None, batch_size=8, make=make_private, lr=0.1, **options):
    module = module or small()
    defaults = {"noise_multiplier": 1.0} if make is make_private else {}
    defaults |= {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=lr),
        "data_loader": DataLoader(TensorDataset(*(data or images(40))), batch_size=batch_size),
    }
    return make(**defaults | {"max_grad_norm": 0.5, "seed": 3} | options)


def run(module, optimizer, loader, epochs=1, stop=None):
    for _ in range(epochs):
        for count, (x, y) in enumerate(loader, start=1):
            CRITERION(module(x), y).backward()
            optimizer.step()
            if count == stop:
                break


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_every_draw_is_one_step_and_every_charge_is_the_event_of_the_sampler_that_ran(sampling):
    module, opt, loader = private(**options_of(sampling), max_physical_batch_size=5)
    run(module, opt, loader, epochs=2)
    engine = engine_of(module)
    assert engine.steps == 2 * len(loader) == 10
    assert list(engine.ledger.events()) == [(engine.plan.event(), 2 if sampling == "balls_in_bins" else 10)]
    assert engine.ledger.relation == engine.plan.relation
    assert engine.draws.sampler == engine.plan.sampler()


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_noise_is_relative_to_what_one_record_can_move_under_the_relation(sampling):
    module, opt, loader = private(**options_of(sampling), noise_multiplier=50.0, max_grad_norm=1e-3, lr=1.0)
    before = module[1].weight.detach().clone()
    run(module, opt, loader, stop=1)
    noise = (before - module[1].weight.detach()) * 8
    std = 50.0 * (2e-3 if sampling == "fixed_size" else 1e-3)
    assert abs(float((noise / std).square().sum()) - 320) < 5 * math.sqrt(2 * 320)


def ones(batch_size, size, **options):
    """No noise, and every record's own gradient is 1, clipped to 0.5."""
    return private(
        nn.Sequential(nn.Linear(1, 1, bias=False)),
        (torch.ones(40, 1), torch.zeros(40)),
        batch_size=batch_size,
        **options | {"noise_multiplier": 0, "max_physical_batch_size": size, "lr": 1.0},
    )


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
@pytest.mark.parametrize("size", [None, 1, 3])
def test_fault_12_the_sum_is_divided_by_the_public_expected_size_whatever_was_drawn(sampling, size):
    module, opt, loader = ones(batch_size=2, size=size, **options_of(sampling))
    weight = module[0]
    sizes = set()
    drawn = 0
    for x, _ in loader:
        before = weight.weight.item()
        module(x).mean().backward()
        opt.step()
        drawn += int(loader_batch(loader).weights.sum())
        if loader_batch(loader).last:
            assert before - weight.weight.item() == pytest.approx(drawn * 0.5 / 2, abs=1e-5)
            sizes.add(drawn)
            drawn = 0
    assert sizes == {2} if sampling == "fixed_size" else len(sizes) > 2
    if sampling == "poisson":
        assert 0 in sizes  # an empty draw is a step like any other


def loader_batch(loader):
    return loader._listener._batch


@pytest.mark.parametrize("sampling", PRIVATE_SAMPLINGS)
def test_fault_13_noise_is_calibrated_for_the_event_and_the_steps_that_run(sampling, monkeypatch):
    by_rdp = functools.partial(calibrate_noise_multiplier, accountant="rdp")  # the others take seconds
    monkeypatch.setattr("dpfa_training.private.calibrate_noise_multiplier", by_rdp)
    options = options_of(sampling) | {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}
    options |= {"max_batch": 30} if sampling == "truncated_poisson" else {}
    try:
        module, opt, loader = private(make=make_private_with_epsilon, data=images(39), batch_size=10, **options)
    except UnsupportedEvent as error:
        pytest.skip(str(error))
    run(module, opt, loader, epochs=2)
    engine = engine_of(module)
    assert engine.steps == 2 * len(loader) == 8
    spent = engine.get_epsilon(1e-3, "rdp")
    assert 2.9 < spent <= 3.0
    assert spent == upper_bound("rdp", ((engine.plan.total(8), 1),), 1e-3)
    before = module[1].weight.detach().clone()
    with pytest.raises(BudgetExhausted, match="calibrated for 8 steps"):
        run(module, opt, loader)
    assert torch.equal(before, module[1].weight)


def test_a_round_is_charged_before_its_first_step_and_what_is_left_of_it_stays_charged(tmp_path):
    ledger = Ledger.open(tmp_path / "l.db", unit="example", relation="add_or_remove", delta=1e-5)
    module, opt, loader = private(sampling="balls_in_bins", ledger=ledger)
    assert not list(ledger.events())
    run(module, opt, loader, stop=1)
    assert [count for _, count in ledger.events()] == [1]
    run(module, opt, loader, stop=3)
    assert [count for _, count in ledger.events()] == [2]
    assert engine_of(module).steps == 4
    assert len(list(ledger.releases())) == 2  # one durable write each


def test_rounds_that_were_left_count_against_the_planned_ones():
    plan = TrainingPlan(
        noise_multiplier=1.0, max_grad_norm=0.5, population=40, expected_batch_size=8, sampling="balls_in_bins"
    )
    module, rows = small(), DataLoader(TensorDataset(*images(40)), batch_size=8)
    module, opt, loader = attach(
        module, torch.optim.SGD(module.parameters(), lr=0.1), rows, plan, None, None, seed=3, planned_steps=10
    )
    run(module, opt, loader, epochs=2, stop=1)
    with pytest.raises(BudgetExhausted, match="calibrated for 10 steps"):
        run(module, opt, loader)
    assert engine_of(module).steps == 2


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("stepped", [False, True])
def test_fault_5_a_draw_left_early_is_dropped_and_its_step_did_not_happen(size, stepped):
    module, opt, loader = private(TinyViT(), batch_size=16, max_physical_batch_size=size)
    engine = engine_of(module)
    for x, y in loader:
        CRITERION(module(x), y).backward()
        if stepped:
            opt.step()
        break
    taken = engine.steps
    assert taken == (stepped and size is None)
    run(module, opt, loader)
    assert engine.steps == taken + len(loader)
    # drawn once: the left draw is not served again, and only the steps that happened are charged
    assert loader.sampler.position == len(loader) + 1
    assert sum(count for _, count in engine.ledger.events()) == engine.steps


def test_fault_5_sums_of_a_draw_left_early_are_not_in_the_next_step():
    module, opt, loader = ones(batch_size=20, size=3)
    for x, _ in loader:
        module(x).mean().backward()
        opt.step()
        break
    before, drawn = module[0].weight.item(), 0
    for x, _ in loader:
        module(x).mean().backward()
        opt.step()
        drawn += int(loader_batch(loader).weights.sum())
        if loader_batch(loader).last:
            break
    assert before - module[0].weight.item() == pytest.approx(drawn * 0.5 / 20, abs=1e-5)


def test_a_step_missing_at_the_end_of_an_epoch_is_refused_like_any_other():
    module, opt, loader = private()
    for x, y in loader:
        CRITERION(module(x), y).backward()
        if loader.sampler.position < 5:
            opt.step()
    with pytest.raises(NotPrivateError, match="every batch drawn must be used"):
        next(iter(loader))


def test_a_part_of_a_draw_cannot_be_skipped():
    _, _, loader = private(max_physical_batch_size=2)
    rows = iter(loader)
    next(rows)
    with pytest.raises(NotPrivateError, match="every batch drawn must be used"):
        next(rows)


def test_a_draw_in_parts_needs_one_step_only_after_the_last():
    ends = []
    for every in (True, False):
        torch.manual_seed(0)
        module, opt, loader = private(max_physical_batch_size=2)
        for x, y in loader:
            CRITERION(module(x), y).backward()
            if every or loader_batch(loader).last:
                opt.step()
        assert engine_of(module).steps == len(loader)
        ends.append(module[1].weight.detach().clone())
    assert torch.equal(*ends)


def test_rows_chosen_from_memory_change_neither_draws_nor_noise():
    ends = []
    for size in (None, "auto"):
        torch.manual_seed(0)
        module, opt, loader = private(TinyViT(), batch_size=16, max_physical_batch_size=size)
        run(module, opt, loader)
        assert engine_of(module).steps == len(loader)
        ends.append(module.qkv.weight.detach().clone())
    probe = loader.sampler.max_rows
    assert isinstance(probe, MemoryProbe)
    assert probe.chosen is None or probe.chosen >= 2
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sampling": "shuffle"}, "sampling must be one of 'poisson', 'fixed_size'"),
        ({"sampling": "truncated_poisson"}, "max_batch must be an integer >= 1"),
        ({"max_batch": 3}, "max_batch must be left out"),
        ({"unit": "token"}, "unit must be one of 'example', 'user'"),
        ({"unit": "user"}, "user_ids must be given"),
        ({"user_ids": range(40)}, "user_ids must be given"),
        ({"unit": "user", "user_ids": range(3)}, "user of each of the 40 records"),
        ({"unit": "user", "user_ids": [0] * 20 + [1] * 20}, "between 1 and the 2 users"),
        ({"max_physical_batch_size": "big"}, "must be one of 'auto'"),
        ({"max_physical_batch_size": 0}, "must be an integer >= 1"),
        ({"max_physical_batch_size": 2.5}, "must be an integer >= 1, got 2.5"),
        ({"data_loader": [1, 2]}, "the loader must be a torch DataLoader, got 'list'"),
        ({"ledger": "ledger.db"}, "ledger must be a Ledger or None, got 'str'"),
        ({"optimizer": "sgd"}, "optimizer must be a torch Optimizer, got 'str'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(options, text):
    with pytest.raises(PrivacyParameterError, match=text):
        private(**options)


def test_what_make_private_gave_back_is_not_taken_again():
    module, optimizer, loader = private()
    with pytest.raises(PrivacyParameterError, match=r"got 'what make_private gave back'\. Pass the one it is made of"):
        private(small(), data_loader=loader)
    with pytest.raises(NotPrivateError, match="private already"):
        private(module, optimizer=optimizer)


def test_a_ledger_of_another_unit_or_relation_is_refused():
    with pytest.raises(LedgerError, match='unit="example"'):
        private(ledger=Ledger.memory(unit="user"))
    module, opt, loader = private(sampling="fixed_size", ledger=Ledger.memory(relation="add_or_remove"))
    with pytest.raises(LedgerError, match="relation='add_or_remove'"):
        run(module, opt, loader)
    assert engine_of(module).steps == 0


def test_a_draw_of_users_holds_all_their_records_and_users_are_what_is_counted():
    ids = [record // 2 for record in range(40)]
    module, _, loader = private(unit="user", user_ids=ids, batch_size=4)
    plan, heard = engine_of(module).plan, []
    assert (plan.population, plan.expected_batch_size, plan.unit, len(loader)) == (20, 4, "user", 5)
    assert engine_of(module).ledger.unit == "user"
    for _ in loader.draws(5):
        heard.append(loader_batch(loader))
        engine_of(module).abandon()
    for batch in heard:
        real = [i for i, w in zip(batch.indices, batch.weights, strict=True) if w]
        assert {i // 2 for i in real} == {i // 2 for i in range(40) if i in real}
        assert len(real) == 2 * batch.count
