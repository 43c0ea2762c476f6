"""One case for each promised name of accounting, mechanisms, plugins and packaging."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import dp_accounting
import pytest
import torch
from dp_accounting import pld, rdp

from dp_flash_attention import DPFlashAttention, Ledger
from dp_flash_attention.advanced_research_mechanisms import (
    AttentionSensitivityAnalyzer,
    CompositionAnalyzer,
    PrivacyLossDistribution,
    StructuredNoiseMechanism,
)
from dp_flash_attention.amplification import SubsamplingAmplification
from dp_flash_attention.calibration import AdaptiveNoiseCalibrator
from dp_flash_attention.mechanisms import DPMechanism
from dp_flash_attention.privacy import RenyiAccountant
from dpfa_core.events import Gaussian
from dpfa_core.spec import AttentionProblem, PrivacySpec

DELTA = 1e-5
ROOT = Path(__file__).parents[4]


def test_the_renyi_accountant_is_no_lower_than_another_librarys_and_never_falls() -> None:
    book, before = RenyiAccountant(), 0.0
    for _ in range(20):
        book.add_step(sampling_rate=0.05, noise_multiplier=1.0)
        assert book.get_epsilon(delta=DELTA) > before
        before = book.get_epsilon(delta=DELTA)
    step = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    theirs = rdp.RdpAccountant().compose(dp_accounting.SelfComposedDpEvent(step, 20)).get_epsilon(DELTA)
    assert before >= theirs
    book.add_step(0.5, 1e-8, 0.1)
    assert book.get_epsilon(delta=DELTA) > before


def test_the_calibrator_charges_what_it_looks_at() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(60, 4), torch.arange(60) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=10)
    found = AdaptiveNoiseCalibrator(target_epsilon=3.0, confidence_interval=0.95, target_delta=1e-3, accountant="rdp")
    found.calibrate(torch.nn.Linear(4, 2), loader)
    assert found.noise_multiplier > 0
    assert found.clip_norm >= found.interval[0]
    assert list(found.ledger.events())


def test_a_plugin_of_ones_own_without_an_event_is_not_called_private() -> None:
    class Shift(DPMechanism):
        def add_noise(self, tensor: torch.Tensor, sensitivity: float, epsilon: float) -> torch.Tensor:
            return tensor + sensitivity / epsilon

    module = DPFlashAttention(32, 2, noise_mechanism=Shift(), ledger=Ledger.memory())
    assert module(torch.randn(2, 3, 32), return_privacy_stats=True)[1].epsilon_spent == math.inf


def test_amplification_bounds_the_truth_and_without_sampling_it_is_composition() -> None:
    epsilon = SubsamplingAmplification(base_epsilon=2.0, sampling_rate=0.01, num_steps=100).compute_epsilon(delta=DELTA)
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.LaplaceDpEvent(0.5))
    exact = pld.PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(step, 100)).get_epsilon(DELTA)
    assert exact <= epsilon < 200.0
    assert SubsamplingAmplification(0.5, 1.0, 1).compute_epsilon(delta=1e-12) == pytest.approx(0.5)


def test_the_loss_distribution_is_another_librarys() -> None:
    ours = PrivacyLossDistribution([(Gaussian(3.0), 7)], DELTA)
    step = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 7)
    theirs = pld.PLDAccountant().compose(step).get_epsilon(DELTA)
    assert ours.compose() == ours._advanced_composition() == (pytest.approx(theirs, rel=1e-4), DELTA)


def test_structured_noise_has_the_shape_and_the_rank() -> None:
    noise = StructuredNoiseMechanism().generate_low_rank_noise((12, 20), 1.0, 1.0, DELTA, 3)
    assert noise.shape == (12, 20)
    assert torch.linalg.matrix_rank(noise.double(), atol=1e-4) == 3


def test_sensitivities_and_compositions_are_analysed() -> None:
    problem = AttentionProblem(
        batch=1, q_len=16, kv_len=16, q_heads=2, kv_heads=2, head_dim=8, clip_norm=1.0, logit_bound=0.5
    )
    spec = PrivacySpec(epsilon=1.0, delta=DELTA, unit="token", queries="private")
    head = AttentionSensitivityAnalyzer(spec, problem).analyze()["per_head"][0]
    assert head.keys() >= {"query", "key", "value", "tight", "naive"}
    rows = CompositionAnalyzer([(Gaussian(3.0), 7)]).analyze(DELTA)
    assert {"rdp", "pld", "gdp"} <= {row.method for row in rows if row.is_upper_bound}


MODULES = (
    *("privacy", "calibration", "amplification", "mechanisms"),
    *("advanced_research_mechanisms", "enhanced_dp_flash_attention"),
)


def test_the_promised_modules_import_without_what_not_everybody_has() -> None:
    blocked = "import sys\nsys.modules |= {'triton': None, 'transformers': None, 'cupy': None}\n"
    imports = "".join(f"import dp_flash_attention.{module}\n" for module in MODULES)
    subprocess.run([sys.executable, "-c", blocked + imports], check=True)


def test_the_package_has_the_promised_name_floors_and_command() -> None:
    project = tomllib.loads((ROOT / "packages/dp-flash-attention/pyproject.toml").read_text())["project"]
    assert project["name"] == "dp-flash-attention"
    assert project["requires-python"] == ">=3.11"
    assert "torch >= 2.11" in project["dependencies"]
    assert project["scripts"] == {"dpfa": "dp_flash_attention.cli:main"}
    assert not [line for line in project["dependencies"] if line.startswith("opacus")]


def test_the_repository_has_the_promised_shape() -> None:
    names = ("noxfile.py", "packages", "verification", "docs", "benchmarks", "mkdocs.yml", "README.md")
    papers = ("CONTRIBUTING.md", "LICENSE", "SECURITY.md")
    assert [name for name in (*names, *papers) if not (ROOT / name).exists()] == []
