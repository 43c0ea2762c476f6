"""Calibration on private data: charged before it is used, and never more than the target together with training."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_flash_attention.calibration import AdaptiveNoiseCalibrator
from dpfa_core.errors import BudgetExhausted, NotPrivateError, PrivacyParameterError
from dpfa_core.events import EpsilonDelta, Gaussian
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, make_private


def data(rows=400, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 6, generator=generator)
    inputs = inputs / inputs.norm(dim=1, keepdim=True) * scale
    return DataLoader(TensorDataset(inputs, torch.zeros(rows, dtype=torch.int64)), batch_size=40)


def model():
    """All gradients have the norm of the input / sqrt(2): the logits are 0."""
    layer = nn.Linear(6, 2, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def calibrator(**options):
    settings = {"target_epsilon": 3.0, "target_delta": 1e-4, "accountant": "rdp"}
    return AdaptiveNoiseCalibrator(**settings | options)


def test_clip_norm_is_above_the_quantile_of_the_norms_and_near_it():
    found = calibrator(calibration_share=0.9).calibrate(model(), data(scale=4.0))
    low, high = found.interval
    assert low <= 4 / math.sqrt(2) <= high == found.clip_norm
    assert high < 4 / math.sqrt(2) * 2.0 ** (20 / 63) ** 1.01


def train(module, optimizer, loader, draws):
    for x, y in loader.draws(draws):
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()


def test_calibration_and_training_together_keep_the_target_and_one_epoch_more_is_refused():
    loader, module = data(), model()
    found = calibrator().calibrate(module, loader, epochs=2)
    module, optimizer, loader = make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=found.noise_multiplier,
        max_grad_norm=found.clip_norm,
        ledger=found.ledger,
        seed=1,
    )
    train(module, optimizer, loader, 20)
    calibration, training = found.ledger.events()
    assert isinstance(calibration[0], EpsilonDelta)
    assert calibration[0].delta == 0
    assert calibration[0].epsilon == pytest.approx(0.15)
    assert training == (engine_of(module).plan.event(), 20)
    assert 2.4 < found.ledger.spent(1e-4) <= 3.0
    with pytest.raises(BudgetExhausted):
        train(module, optimizer, loader, 20)


def test_a_sample_is_amplified_and_the_charge_is_that_of_sample_and_selection(monkeypatch):
    seen = {}

    def spy(values, quantile, *, epsilon, record, **options):
        seen.update(epsilon=epsilon, count=len(values), charged_before=list(ledger.events()))
        record(EpsilonDelta(epsilon, 0.0))
        seen["charged"] = [event for event, _ in ledger.events()]
        raise KeyboardInterrupt

    monkeypatch.setattr("dpfa_mechanisms.quantiles.private_quantile", spy)
    ledger = Ledger.memory()
    with pytest.raises(KeyboardInterrupt):
        calibrator(ledger=ledger).calibrate(model(), data(), sample_size=100)
    probability = 0.25
    assert 40 < seen["count"] < 180
    assert seen["epsilon"] > 0.4 > 0.15
    (event,) = seen["charged"]
    assert event.epsilon >= math.log1p(probability * math.expm1(seen["epsilon"]))
    assert event.epsilon == pytest.approx(0.15)


def test_what_the_ledger_holds_already_is_part_of_the_target():
    ledger = Ledger.memory()
    ledger.record(Gaussian(3.0), purpose="earlier", mechanism="gaussian", backend="torch")
    assert (
        calibrator(ledger=ledger).calibrate(model(), data()).noise_multiplier
        > calibrator().calibrate(model(), data()).noise_multiplier
    )


def test_nothing_is_spent_where_the_target_cannot_be_kept_or_a_norm_cannot_be_had():
    ledger = Ledger.memory()
    ledger.record(Gaussian(0.5), purpose="earlier", mechanism="gaussian", backend="torch")
    with pytest.raises(PrivacyParameterError, match="more noise can reach"):
        calibrator(ledger=ledger).calibrate(model(), data())
    ledger = Ledger.memory()
    with pytest.raises(PrivacyParameterError, match="pass per_sample_loss"):
        calibrator(ledger=ledger).calibrate(model(), DataLoader(TensorDataset(torch.ones(20, 6)), batch_size=4))
    assert list(ledger.events()) == []


def test_records_that_move_one_anothers_norms_are_refused_before_anything_is_spent():
    ledger, module = Ledger.memory(), model()

    def coupled(layer, batch):
        return nn.functional.cross_entropy(layer(batch[0]), batch[1], reduction="none") * len(batch[0])

    with pytest.raises(NotPrivateError, match="must not depend on others"):
        calibrator(ledger=ledger).calibrate(module, data(), per_sample_loss=coupled)
    assert list(ledger.events()) == []
    assert module.training


def test_any_loss_and_batch_may_be_used():
    rows = DataLoader(TensorDataset(torch.ones(50, 6)), batch_size=10)
    found = calibrator().calibrate(model(), rows, per_sample_loss=lambda module, batch: module(batch[0]).sum(1))
    assert found.bounds[0] <= found.clip_norm <= found.bounds[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_delta": None}, "target_delta must be given"),
        ({"target_delta": 1.5}, r"target_delta must be in \(0, 1\), got 1.5"),
        ({"target_epsilon": 0}, "target_epsilon must be a finite number > 0"),
        ({"confidence_interval": 95}, "confidence_interval must be in"),
        ({"quantile": 0}, "quantile must be in"),
        ({"calibration_share": 1.0}, "calibration_share must be in"),
        ({"bounds": (1.0, 0.5)}, "bounds must be"),
        ({"ledger": Ledger.memory(relation="replace")}, "relation"),
        ({"ledger": Ledger.memory(unit="user")}, "unit"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options, message):
    with pytest.raises(PrivacyParameterError, match=message):
        calibrator(**options)


def test_results_before_calibration_are_refused():
    for name in ("noise_multiplier", "clip_norm", "interval"):
        with pytest.raises(PrivacyParameterError, match="calibrated first"):
            getattr(calibrator(), name)
    with pytest.raises(PrivacyParameterError, match="sample_size must be at most 400"):
        calibrator().calibrate(model(), data(), sample_size=500)


def test_importing_it_needs_no_torch():
    code = "import sys, dp_flash_attention.calibration\nassert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)
