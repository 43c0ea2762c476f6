import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, load_checkpoint, make_private, save_checkpoint


def start(ledger, seed=5, noise_multiplier=1.0, size=None):
    torch.manual_seed(0)
    module = TinyViT()
    module, opt, loader = make_private(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(*images(40)), batch_size=8),
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.5,
        ledger=ledger,
        seed=seed,
        max_physical_batch_size=size,
    )
    return module, opt, loader


def train(module, opt, loader, draws):
    for x, y in loader.draws(draws):
        nn.functional.cross_entropy(module(x), y).backward()
        opt.step()


def ledger(path):
    return Ledger.open(path, unit="example", relation="add_or_remove", delta=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    module, opt, loader = start(ledger(tmp_path / "whole.db"))
    train(module, opt, loader, 8)
    whole = module.state_dict()

    module, opt, loader = start(ledger(tmp_path / "parts.db"))
    train(module, opt, loader, 3)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler, {"note": "x"})
    module, opt, loader = start(ledger(tmp_path / "parts.db"))
    assert load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler) == {"note": "x"}
    train(module, opt, loader, 5)
    assert engine_of(module).steps == 8
    assert all(torch.equal(whole[name], value) for name, value in module.state_dict().items())
    assert next(iter(engine_of(module).ledger.events()))[1] == 8


def test_redone_steps_are_charged_again_under_a_fresh_key(tmp_path):
    module, opt, loader = start(ledger(tmp_path / "l.db"))
    train(module, opt, loader, 2)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    train(module, opt, loader, 2)  # then the process dies
    lost = module.state_dict()
    module, opt, loader = start(ledger(tmp_path / "l.db"))
    load_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    train(module, opt, loader, 2)
    assert next(iter(engine_of(module).ledger.events()))[1] == 6
    assert not torch.equal(lost["head.weight"], module.head.weight)
    assert engine_of(module).keys.secure


def test_checkpoint_inside_a_draw_is_refused(tmp_path):
    module, opt, loader = start(None, size=2)
    x, y = next(iter(loader))
    nn.functional.cross_entropy(module(x), y).backward()
    opt.step()
    with pytest.raises(NotPrivateError, match="between steps"):
        save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    assert not (tmp_path / "run.pt").exists()


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


def test_no_key_is_written(tmp_path):
    module, _, loader = start(None)
    save_checkpoint(tmp_path / "run.pt", engine_of(module), loader.sampler)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert set(state) == {"format", "plan", "module", "optimizer", "steps", "position", "extra"}
    secret = engine_of(module).keys.key("training").words.numpy().tobytes()
    assert secret not in (tmp_path / "run.pt").read_bytes()
