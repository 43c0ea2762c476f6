"""Fault 14: a run that goes on where it stopped, under the same noise only where the sums are the same."""

import random
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training_models import images

from dpfa_core.errors import BudgetExhausted, LedgerError, NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_training import TrainingPlan, engine_of, load_checkpoint, make_private, save_checkpoint
from dpfa_training.private import attach

CRITERION = nn.CrossEntropyLoss()


def ledger(path, relation="add_or_remove"):
    return Ledger.open(path, unit="example", relation=relation, delta=1e-5)


def start(ledger, seed=5, size=None, data=None, workers=0, **options):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 5))
    return make_private(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.01),
        data_loader=DataLoader(data or TensorDataset(*images(40)), batch_size=8, num_workers=workers),
        **{"noise_multiplier": 1.0, "max_grad_norm": 0.5} | options,
        ledger=ledger,
        seed=seed,
        max_physical_batch_size=size,
    )


def train(module, opt, loader, draws=None, stop=None):
    """All batches of `draws` draws (None: an epoch), or only `stop` physical batches."""
    for count, (x, y) in enumerate(loader if draws is None else loader.draws(draws), start=1):
        CRITERION(module(x), y).backward()
        opt.step()
        if count == stop:
            return True
    return False


def weights(module):
    return torch.cat([value.flatten() for value in module.state_dict().values()])


def charged(module):
    return sum(count for _, count in engine_of(module).ledger.events())


class Augmented(Dataset):
    """Random noise on each record, from every generator there is."""

    rows = images(40)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        shift = torch.rand(()) + random.random() + np.random.rand()
        return (self.rows[0][index] + shift).float(), self.rows[1][index]


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size", "balls_in_bins", "truncated_poisson"])
@pytest.mark.parametrize("workers", [0, 2])
def test_fault_14_resuming_in_mid_draw_equals_the_uninterrupted_run_bit_for_bit(tmp_path, sampling, workers):
    relation = "replace" if sampling == "fixed_size" else "add_or_remove"
    options = {"sampling": sampling, "size": 3, "workers": workers, "data": Augmented()}
    options |= {"max_batch": 11} if sampling == "truncated_poisson" else {}
    module, opt, loader = start(ledger(tmp_path / "whole.db", relation), **options)
    train(module, opt, loader)
    train(module, opt, loader)
    whole, steps, cost = weights(module), engine_of(module).steps, charged(module)
    assert steps == 10

    module, opt, loader = start(ledger(tmp_path / "parts.db", relation), **options)
    unfinished, stops = True, 0
    while unfinished:  # epochs are finished; each process stops after five physical batches
        iterator = iter(loader)
        for _ in range(5):
            batch = next(iterator, None)
            if batch is None:
                break
            CRITERION(module(batch[0]), batch[1]).backward()
            opt.step()
        engine, stops = engine_of(module), stops + 1
        save_checkpoint(tmp_path / "run.pt", engine, loader.sampler, {"note": stops})
        unfinished = engine.steps < 10 or engine.in_draw
        module, opt, loader = start(ledger(tmp_path / "parts.db", relation), **options)
        assert load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler) == {"note": stops}
    assert stops > 4
    assert not engine_of(module).keys.secure
    assert torch.equal(whole, weights(module))
    assert (engine_of(module).steps, charged(module)) == (steps, cost)


def lose_two_steps(tmp_path, seed=5, **options):
    """Two steps are in the checkpoint, two more in the ledger only; returns the weights after all four."""
    module, opt, loader = start(ledger(tmp_path / "l.db"), seed=seed, **options)
    train(module, opt, loader, 2)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    train(module, opt, loader, 2)
    return weights(module)


def resumed(tmp_path, **options):
    module, opt, loader = start(ledger(tmp_path / "l.db"), **options)
    load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    return module, opt, loader


def test_a_step_redone_bit_for_bit_is_the_same_release_and_charged_once(tmp_path):
    lost = lose_two_steps(tmp_path)
    module, opt, loader = resumed(tmp_path)
    train(module, opt, loader, 2)
    assert torch.equal(lost, weights(module))
    assert charged(module) == 4
    train(module, opt, loader, 1)
    assert charged(module) == 5


def test_without_a_seed_redone_steps_have_fresh_noise_and_are_charged_again(tmp_path):
    lost = lose_two_steps(tmp_path, seed=None)
    module, opt, loader = resumed(tmp_path, seed=None)
    train(module, opt, loader, 2)
    assert charged(module) == 6
    assert not torch.equal(lost, weights(module))


def test_fault_14_changed_data_never_meet_the_noise_they_met_before(tmp_path):
    lost = lose_two_steps(tmp_path)
    x, y = images(40)
    data = TensorDataset(x + 0.1, y)
    module, opt, loader = resumed(tmp_path, data=data)
    train(module, opt, loader, 2)  # the first redone step is found to differ: that draw is given up
    engine = engine_of(module)
    assert engine.keys.secure
    assert loader.sampler.keys is engine.keys
    assert engine.steps == 4
    assert charged(module) == 6
    assert not torch.allclose(lost, weights(module), atol=1e-3)


@pytest.mark.parametrize(
    "changed", [{"seed": 6}, {"size": 4}, {"workers": 1}, {"data": Augmented()}, {"code": 2}, {"backend": 2}]
)
def test_another_key_loader_or_code_takes_fresh_keys(tmp_path, changed, monkeypatch):
    options = {"size": 3}
    module, opt, loader = start(ledger(tmp_path / "l.db"), **options)
    train(module, opt, loader, 2, stop=1)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    if changed == {"code": 2}:
        monkeypatch.setattr("dpfa_training.checkpoint._versions", lambda: ("another",))
        changed = {}
    if changed == {"backend": 2}:  # of which the noise may differ in its last bit
        monkeypatch.setattr("dpfa_training.checkpoint.BACKENDS.entry", lambda name: SimpleNamespace(version="another"))
        changed = {}
    module, opt, loader = resumed(tmp_path, **options | changed)
    engine = engine_of(module)
    assert engine.keys.secure
    assert not engine.in_draw  # a draw is not finished by another key than it was begun with
    train(module, opt, loader, 1)
    assert charged(module) == engine.steps


def test_a_round_that_was_begun_is_given_up_by_fresh_keys_and_stays_charged(tmp_path):
    options = {"seed": None, "sampling": "balls_in_bins"}
    lose_two_steps(tmp_path, **options)
    module, opt, loader = resumed(tmp_path, **options)
    assert loader.sampler.position == 5
    train(module, opt, loader)
    assert loader.sampler.position == 10
    assert charged(module) == 2
    assert engine_of(module).steps == 7


def test_fault_14_a_ledger_without_the_runs_steps_is_refused(tmp_path):
    lose_two_steps(tmp_path)
    for other in (None, ledger(tmp_path / "other.db")):
        module, _, loader = start(other)
        with pytest.raises(LedgerError, match="must hold the 2 charges of the run"):
            load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)


def test_lines_of_another_run_in_the_same_ledger_pay_for_nothing(tmp_path):
    module, opt, loader = start(ledger(tmp_path / "l.db"))
    train(module, opt, loader, 2)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    other, *rest = start(ledger(tmp_path / "l.db"), seed=9)
    train(other, *rest, 2)
    module, opt, loader = resumed(tmp_path)
    train(module, opt, loader, 2)
    assert charged(module) == 6


def test_lost_steps_count_against_the_planned_ones(tmp_path):
    plan = TrainingPlan(noise_multiplier=1.0, max_grad_norm=0.5, population=40, expected_batch_size=8)

    def attached():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        rows = DataLoader(TensorDataset(*images(40)), batch_size=8)
        opt = torch.optim.SGD(module.parameters(), lr=0.1)
        return attach(module, opt, rows, plan, None, ledger(tmp_path / "l.db"), None, 5)

    module, opt, loader = attached()
    train(module, opt, loader, 2)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    train(module, opt, loader, 2)
    module, opt, loader = attached()
    load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    with pytest.raises(BudgetExhausted, match="calibrated for 5 steps"):
        train(module, opt, loader, 3)
    assert engine_of(module).steps == 3
    assert charged(module) == 5


def test_a_loop_that_was_left_gives_its_draw_up_in_the_checkpoint_too(tmp_path):
    module, opt, loader = start(ledger(tmp_path / "l.db"), size=2)
    train(module, opt, loader, stop=1)
    assert loader.sampler.start
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    train(module, opt, loader)
    whole = weights(module)
    module, opt, loader = resumed(tmp_path, size=2)
    train(module, opt, loader)
    assert engine_of(module).steps == 5
    assert loader.sampler.position == 6
    assert torch.equal(whole, weights(module))


def test_checkpoint_with_an_open_batch_is_refused(tmp_path):
    module, opt, loader = start(None, size=2)
    engine, rows = engine_of(module), iter(loader)

    def refused():
        with pytest.raises(NotPrivateError, match="finish the batch first"):
            save_checkpoint(tmp_path / "run.pt", engine, loader.sampler)
        return not (tmp_path / "run.pt").exists()

    x, y = next(rows)
    assert refused()
    loss = CRITERION(module(x), y)
    assert refused()
    loss.backward()
    while engine.steps == 0:
        if loader.sampler.start == 0:  # the last part, before its step
            assert refused()
            opt.step()
        else:
            x, y = next(rows)
            CRITERION(module(x), y).backward()
    save_checkpoint(tmp_path / "run.pt", engine, loader.sampler)


def test_checkpoint_of_another_plan_or_none_is_refused(tmp_path):
    module, _, loader = start(None)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    other, _, other_loader = start(None, noise_multiplier=2.0)
    with pytest.raises(PrivacyParameterError, match="same plan"):
        load_checkpoint(tmp_path / "run.pt", engine_of(other), other_loader.sampler)
    with pytest.raises(PrivacyParameterError, match="expected a checkpoint"):
        load_checkpoint(tmp_path / "none.pt", engine_of(other), other_loader.sampler)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:200])
    with pytest.raises(PrivacyParameterError, match="expected a checkpoint"):
        load_checkpoint(tmp_path / "cut.pt", engine_of(other), other_loader.sampler)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    module, _, loader = start(None)
    engine = engine_of(module)
    for wrong, text in (((module, loader.sampler), "engine must be"), ((engine, loader), "sampler must be that of")):
        with pytest.raises(PrivacyParameterError, match=text):
            save_checkpoint(tmp_path / "run.pt", *wrong)
        with pytest.raises(PrivacyParameterError, match=text):
            load_checkpoint(tmp_path / "run.pt", *wrong)
    assert not (tmp_path / "run.pt").exists()


def test_no_key_is_written_and_files_are_their_owners(tmp_path):
    module, opt, loader = start(ledger(tmp_path / "l.db"))
    (tmp_path / "run.pt.part").write_bytes(b"left by a crash, readable by all")
    (tmp_path / "run.pt.part").chmod(0o644)
    train(module, opt, loader, 1)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    for purpose in ("training", "sampling", "release"):
        secret = engine_of(module).keys.key(purpose).words.numpy().tobytes()
        for path in tmp_path.iterdir():
            assert secret not in path.read_bytes()
            assert secret.hex().encode() not in path.read_bytes()
    for name in ("run.pt", "l.db.steps"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not (tmp_path / "run.pt.part").exists()


@pytest.mark.parametrize("changed", [{"noise_multiplier": 2.0}, {"max_grad_norm": 0.4}])
def test_a_second_run_of_a_seed_does_not_put_its_noise_on_other_sums(tmp_path, changed):
    first = []
    for _ in range(2):  # the same run twice is the same release twice, and charged twice
        module, opt, loader = start(ledger(tmp_path / "l.db"))
        train(module, opt, loader, 2)
        first.append(weights(module))
    assert torch.equal(*first)
    assert charged(module) == 4
    module, opt, loader = start(ledger(tmp_path / "l.db"), **changed)
    train(module, opt, loader, 2)
    assert engine_of(module).keys.secure
    assert engine_of(module).steps == 2


def test_a_line_cut_by_a_crash_is_a_step_that_was_not_taken(tmp_path):
    lost = lose_two_steps(tmp_path)
    journal = tmp_path / "l.db.steps"
    journal.write_text(journal.read_text()[:-5])
    module, opt, loader = resumed(tmp_path)
    train(module, opt, loader, 2)
    assert torch.equal(lost, weights(module))
    assert journal.read_text().count(" 3 ") == 2
