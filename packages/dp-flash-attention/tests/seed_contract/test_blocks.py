"""Toy versions of every promised piece of code that can run by now: smaller sizes, this machine's device.

Pieces that need what is not there yet are those of the later rows.
"""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import Tensor, nn

import dp_flash_attention
from dp_flash_attention import (
    DPCheckpointedAttention,
    DPFlashAttention,
    EnhancedDPFlashAttention,
    Ledger,
    PrivacyMechanismType,
    check_release_paths,
    create_enhanced_dp_flash_attention,
    create_research_mechanism,
    dp_flash_attn_func,
)
from dp_flash_attention.advanced_research_mechanisms import PrivacyLossDistribution, StructuredNoiseMechanism
from dp_flash_attention.amplification import SubsamplingAmplification
from dp_flash_attention.calibration import AdaptiveNoiseCalibrator
from dp_flash_attention.mechanisms import DPMechanism
from dp_flash_attention.privacy import RenyiAccountant
from dpfa_attention import enhanced_module
from dpfa_attention.projection import projected
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Gaussian

EMBED, HEADS = 64, 4
SMALL = {"embed_dim": EMBED, "num_heads": HEADS}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, EMBED, generator=torch.Generator().manual_seed(0))


# ---- the front page


def test_versions_and_the_self_test_are_printed() -> None:
    print(dp_flash_attention.cuda_version())
    print(f"CUDA available: {torch.cuda.is_available()}, version {torch.version.cuda}")
    assert callable(dp_flash_attention.privacy_check)


def test_basic_usage_in_half_precision(x: Tensor) -> None:
    dp_attn = DPFlashAttention(**SMALL, epsilon=1.0, delta=1e-5, max_grad_norm=1.0)
    query, key, value = (x.to(torch.float16) + shift for shift in range(3))
    output, privacy_stats = dp_attn(query, key, value, return_privacy_stats=True)
    assert output.dtype == torch.float16
    assert f"{privacy_stats.epsilon_spent:.2f}" == "1.00"
    assert f"{privacy_stats.grad_norm:.2f}" == "nan"


def test_the_function_is_called_like_flash_attention() -> None:
    q, k, v = torch.randn(3, 2, 6, 4, 16)
    output = dp_flash_attn_func(q, k, v, causal=True, epsilon=1.0, delta=1e-5)
    assert output.shape == q.shape


def test_training_steps_are_accounted_by_what_is_spent(x: Tensor) -> None:
    dp_attn = DPFlashAttention(**SMALL, epsilon=0.5, delta=1e-6)
    accountant, delta, sampling_rate = RenyiAccountant(), 1e-6, 0.1
    for _ in range(3):
        dp_attn(x)
        accountant.add_step(dp_attn.get_privacy_spent(), delta, sampling_rate)
    total_epsilon = accountant.get_epsilon(delta=1e-5)
    assert 0 < total_epsilon < 3 * 0.5 * math.e


def test_heads_with_their_own_levels(x: Tensor) -> None:
    head_epsilons = [0.5, 1.0, 10.0, math.inf]
    options = {"head_epsilons": head_epsilons, "strategy": "importance_based"}
    with pytest.raises(PrivacyParameterError, match="allow_infinite_heads=True"):
        DPFlashAttention(**SMALL, **options)
    dp_attn = DPFlashAttention(**SMALL, **options, allow_infinite_heads=True, ledger=Ledger.memory())
    assert dp_attn(x, return_privacy_stats=True)[1].epsilon_spent == math.inf
    dp_attn = DPFlashAttention(**SMALL, head_epsilons=[0.5, 1.0, 2.0, 10.0], strategy="importance_based")
    assert 10.0 < dp_attn(x, return_privacy_stats=True)[1].epsilon_spent < 13.5


def test_noise_is_calibrated_on_private_data(x: Tensor) -> None:
    model = nn.Linear(8, 2)
    data = torch.utils.data.TensorDataset(torch.randn(60, 8), torch.arange(60) % 2)
    calibration_loader = torch.utils.data.DataLoader(data, batch_size=10)
    with pytest.raises(PrivacyParameterError, match="target_delta must be given"):
        AdaptiveNoiseCalibrator(target_epsilon=1.0, confidence_interval=0.95)
    calibrator = AdaptiveNoiseCalibrator(1.0, 0.95, target_delta=1e-3, accountant="rdp")
    calibrator.calibrate(model, calibration_loader)
    dp_attn = DPFlashAttention(**SMALL)
    dp_attn.set_noise_multiplier(calibrator.noise_multiplier)
    dp_attn.set_clip_norm(calibrator.clip_norm)
    assert dp_attn(x, return_privacy_stats=True)[1].noise_multiplier == calibrator.noise_multiplier


def test_checkpointed_attention_trains(x: Tensor) -> None:
    dp_checkpoint_attn = DPCheckpointedAttention(
        **SMALL, epsilon=1.0, checkpoint_gradients=True, segments=4, upstream_gradients="allow"
    )
    dp_checkpoint_attn(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in dp_checkpoint_attn.parameters())


def test_a_mechanism_of_ones_own_runs_as_written(x: Tensor) -> None:
    class LaplacianAttention(DPMechanism):
        def add_noise(self, tensor, sensitivity, epsilon):
            scale = sensitivity / epsilon
            noise = torch.distributions.Laplace(0, scale).sample(tensor.shape)
            return tensor + noise.to(tensor.device)

    dp_attn = DPFlashAttention(embed_dim=EMBED, num_heads=HEADS, noise_mechanism=LaplacianAttention())
    output, stats = dp_attn(x, return_privacy_stats=True)
    assert output.isfinite().all()
    assert stats.privacy_mechanism == "LaplacianAttention"
    assert stats.epsilon_spent == math.inf  # it says nothing of its price


def test_amplification_by_sampling() -> None:
    amplifier = SubsamplingAmplification(base_epsilon=2.0, sampling_rate=0.01, num_steps=1000)
    effective_epsilon = amplifier.compute_epsilon(delta=1e-5)
    assert 0 < effective_epsilon < 2.0 * 1000
    assert f"{effective_epsilon:.2f}"


# ---- the deployment guide


def test_the_factory_with_everything_on(x: Tensor) -> None:
    dp_attn = create_enhanced_dp_flash_attention(
        **SMALL,
        epsilon=1.0,
        delta=1e-5,
        mechanism="pld",
        noise_structure="low_rank",
        sensitivity_analysis=True,
        composition_method="pld",
    )
    _, privacy_stats = dp_attn(x, return_privacy_stats=True)
    assert f"{privacy_stats.epsilon_spent:.3f}" in ("1.000", "0.999")
    assert privacy_stats.privacy_mechanism == "low_rank"


def test_an_advanced_configuration(x: Tensor) -> None:
    dp_attn = EnhancedDPFlashAttention(
        embed_dim=EMBED,
        num_heads=8,
        epsilon=3.0,
        delta=1e-5,
        privacy_mechanism="structured_noise",
        noise_structure="attention_aware",
        composition_method="pld",
        sensitivity_analysis=True,
        adaptive_noise=True,
        head_epsilons=[0.5, 1.0, 1.0, 2.0] * 2,
        max_grad_norm=0.8,
    )
    dp_attn.enable_adaptive_noise(True)
    _, stats = dp_attn(x, return_privacy_stats=True)
    assert stats.unit == "token"
    assert stats.epsilon_spent <= 3.0
    analysis = dp_attn.export_privacy_analysis()
    assert analysis["privacy_spent"]["total_epsilon"] <= 3.0
    assert analysis["research_features"]["pld_available"] is True
    assert isinstance(create_research_mechanism(PrivacyMechanismType.PLD).name, str)


class DPTransformerLayer(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int, epsilon: float, delta: float) -> None:
        super().__init__()
        self.attention = EnhancedDPFlashAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            epsilon=epsilon / 2,
            delta=delta / 2,
            privacy_mechanism="pld",
            noise_structure="low_rank",
            sensitivity_analysis=True,
        )
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.ff = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.ReLU(), nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, x: Tensor, return_privacy_stats: bool = False):
        attn_out, privacy_stats = self.attention(self.norm1(x), return_privacy_stats=True)
        x = x + attn_out
        x = x + self.ff(self.norm2(x))
        return (x, privacy_stats) if return_privacy_stats else x


def test_a_transformer_layer_runs_and_its_residual_is_named_as_a_leak(x: Tensor) -> None:
    layer = DPTransformerLayer(EMBED, HEADS, epsilon=2.0, delta=1e-5)
    _, stats = layer(x, return_privacy_stats=True)
    assert stats.epsilon_spent <= 1.0
    assert [path.kind for path in check_release_paths(layer, x).leaks] == ["output"]


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "pld", "composition_method": "pld"},
        {"mechanism": "structured_noise", "noise_structure": "low_rank", "rank": 16},
        {"mechanism": "standard", "composition_method": "renyi"},
        {"noise_structure": "low_rank", "rank": 16},
        {"noise_structure": "sparse", "sparsity": 0.9},
        {"noise_structure": "attention_aware"},
        {"noise_structure": "block_diagonal", "block_size": 32},
        {"sensitivity_analysis": True, "adaptive_noise": True},
        {"sensitivity_analysis": False, "max_grad_norm": 1.2, "head_epsilons": [0.5, 1.0, 1.5, 2.0] * (HEADS // 4)},
    ],
    ids=str,
)
def test_a_fragment_with_a_size_added_runs_and_without_one_says_so(x: Tensor, options: dict) -> None:
    with pytest.raises(TypeError, match="'embed_dim' and 'num_heads'"):
        EnhancedDPFlashAttention(**options)
    dp_attn = EnhancedDPFlashAttention(**SMALL, **options)
    _, stats = dp_attn(x, return_privacy_stats=True)
    assert 0 < stats.epsilon_spent < 4.0


def monitor_privacy(dp_model: DPFlashAttention, max_epsilon: float = 3.0) -> bool:
    privacy_info = dp_model.get_privacy_spent()
    print(f"{privacy_info['total_epsilon']:.3f} / {max_epsilon}, {privacy_info['total_delta']:.2e}")
    print(f"{privacy_info['privacy_mechanism']}, {privacy_info['composition_method']}")
    return privacy_info["total_epsilon"] < max_epsilon


def generate_privacy_report(analysis: dict) -> str:
    return f"""
    {analysis["configuration"]["privacy_mechanism"]} {analysis["configuration"]["noise_structure"]}
    {analysis["configuration"]["composition_method"]}
    {analysis["privacy_spent"]["total_epsilon"]:.3f} {analysis["privacy_spent"]["total_delta"]:.2e}
    {analysis["privacy_spent"]["forward_count"]}
    {analysis["research_features"]["pld_available"]}
    {analysis["research_features"]["structured_noise_available"]}
    {analysis["research_features"]["sensitivity_analysis_available"]}
    {analysis.get("performance_stats", {}).get("forward_pass", {}).get("avg_time", "N/A")}
    """


def test_monitoring_and_reports(x: Tensor, tmp_path) -> None:
    dp_attn = EnhancedDPFlashAttention(**SMALL, epsilon=1.0)
    assert monitor_privacy(dp_attn)
    for _ in range(9):
        dp_attn(x)
    assert not monitor_privacy(dp_attn)
    perf_stats = dp_attn.get_performance_stats()
    assert f"{perf_stats['forward_pass']['avg_time']:.3f}ms" != "0.000ms"
    assert f"{perf_stats['memory_usage']:.1f}MB" != "0.0MB"
    analysis = dp_attn.export_privacy_analysis()
    with (tmp_path / "privacy_analysis.json").open("w") as file:
        json.dump(analysis, file, indent=2)
    report = generate_privacy_report(json.loads((tmp_path / "privacy_analysis.json").read_text()))
    assert "pld None" in report
    assert " 9\n" in report


def benchmark_mechanisms(x: Tensor) -> dict[str, float]:
    mechanisms = {
        "standard": DPFlashAttention(EMBED, HEADS, epsilon=1.0, device=x.device),
        "pld": EnhancedDPFlashAttention(EMBED, HEADS, epsilon=1.0, privacy_mechanism="pld", device=x.device),
        "structured": EnhancedDPFlashAttention(
            EMBED, HEADS, epsilon=1.0, privacy_mechanism="structured_noise", noise_structure="low_rank", device=x.device
        ),
    }
    results = {}
    for name, model in mechanisms.items():
        model(x)
        start_time = time.time()
        for _ in range(3):
            model(x)
        results[name] = (time.time() - start_time) / 3 * 1000
    return results


def test_mechanisms_are_timed(x: Tensor) -> None:
    assert min(benchmark_mechanisms(x).values()) > 0


def test_a_memory_saving_configuration(x: Tensor) -> None:
    dp_attn = EnhancedDPFlashAttention(**SMALL, epsilon=1.0, checkpoint_gradients=True, segments=4)
    assert dp_attn(x).shape == x.shape


def test_an_exhausted_budget_is_counted_anew_for_a_reason_only(x: Tensor) -> None:
    dp_attn = EnhancedDPFlashAttention(**SMALL, epsilon=1.0)
    dp_attn(x)
    privacy_info = dp_attn.get_privacy_spent()
    if privacy_info["total_epsilon"] > 0.5:
        with pytest.raises(PrivacyParameterError, match="reason must say why"):
            dp_attn.reset_privacy_accounting()
        dp_attn.reset_privacy_accounting(reason="other records")
    assert dp_attn.get_privacy_spent()["total_epsilon"] == 0.0


def test_all_optimisations_under_autocast(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # a compiler for C++ is not on every machine
    compiled = torch.compile(projected, backend="aot_eager")
    monkeypatch.setattr(enhanced_module, "_compiled_projections", lambda: compiled)
    dp_attn = EnhancedDPFlashAttention(
        **SMALL,
        epsilon=1.0,
        privacy_mechanism="pld",
        noise_structure="low_rank",
        sensitivity_analysis=True,
        adaptive_noise=True,
        dtype=torch.float16,
        compile_kernels=True,
    )
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        output = dp_attn(x)
    assert output.shape == x.shape
    assert output.isfinite().all()


def test_the_production_settings_refuse_dropout_in_a_release_and_run_without_it(x: Tensor) -> None:
    settings = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "max_grad_norm": 1.0,
        "privacy_mechanism": "pld",
        "noise_structure": "low_rank",
        "composition_method": "pld",
        "sensitivity_analysis": True,
        "adaptive_noise": True,
    }
    with pytest.raises(PrivacyParameterError, match="dropout must be 0"):
        EnhancedDPFlashAttention(**SMALL, **settings, dropout=0.1)
    assert EnhancedDPFlashAttention(**SMALL, **settings)(x).shape == x.shape


# ---- the reports


def test_loss_distributions_compose_and_low_rank_noise_is_generated() -> None:
    losses = PrivacyLossDistribution(Gaussian(4.0), delta=1e-5)
    assert losses.compose() == losses._advanced_composition()
    noise = StructuredNoiseMechanism().generate_low_rank_noise(
        (10, 20), sensitivity=1.0, epsilon=1.0, delta=1e-5, rank=4
    )
    assert noise.shape == (10, 20)
