"""One case for each promised name of the attention modules and the call."""

from __future__ import annotations

import json
import math

import dp_accounting
import pytest
import torch
import torch.nn.functional as F
from dp_accounting import pld, rdp
from torch import Tensor, nn

import dp_flash_attention
from dp_flash_attention import (
    DPCheckpointedAttention,
    DPFlashAttention,
    EnhancedDPFlashAttention,
    Ledger,
    PrivacyMechanismType,
    create_enhanced_dp_flash_attention,
    create_research_mechanism,
    dp_flash_attn_func,
)
from dpfa_core.errors import NotPrivateError, PrivacyParameterError

E, H, DELTA = 32, 2, 1e-5
SPENT = {"total_epsilon", "total_delta", "privacy_mechanism", "composition_method", "forward_count"}


def words(*shape: int, seed: int = 0, **options: object) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def enhanced(**options: object) -> EnhancedDPFlashAttention:
    settings = {"epsilon": 1.0, "delta": DELTA, "ledger": Ledger.memory(delta=DELTA)} | options
    return EnhancedDPFlashAttention(E, H, **settings)


def test_the_base_module_takes_two_positions_and_names_what_is_wrong() -> None:
    module = DPFlashAttention(
        E, H, epsilon=1.0, delta=DELTA, max_grad_norm=0.5, head_epsilons=[1.0, 2.0], strategy="importance_based",
        noise_mechanism="gaussian", device="cpu",
    )  # fmt: skip
    assert module.clip_norm == 0.5
    for options in ({"epsilon": 0.0}, {"epsilon": -1.0}, {"delta": 1.0}, {"num_heads": 5}, {"noise_mechanism": 3}):
        with pytest.raises(PrivacyParameterError):
            DPFlashAttention(**{"embed_dim": E, "num_heads": H} | options)(words(1, 2, E))


def test_one_input_is_self_attention_and_without_noise_it_is_torchs_attention() -> None:
    module = DPFlashAttention(E, H, math.inf, 0.0, ledger=Ledger.memory())
    x = words(2, 5, E)
    assert torch.equal(module(x), module(x, x, x))
    q, k, v = (
        F.linear(x, w).unflatten(-1, (H, -1)).transpose(1, 2) for w in module.in_proj_weight.chunk(3)  # type: ignore[union-attr]
    )  # fmt: skip
    expected = module.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out, stats = DPFlashAttention(E, H, ledger=Ledger.memory())(x.to(dtype), return_privacy_stats=True)
        assert out.dtype == dtype
        assert stats.epsilon_spent <= 1.0


def test_importance_shares_the_budget_over_heads_and_the_whole_stays_in_it() -> None:
    module = DPFlashAttention(
        E, H, 2.0, DELTA, strategy="importance_based", head_importances=[1.0, 9.0], ledger=Ledger.memory()
    )
    _, stats = module(words(2, 5, E), return_privacy_stats=True)
    assert stats.head_epsilons[0] < stats.head_epsilons[1]
    assert max(stats.head_epsilons) < stats.epsilon_spent <= 2.0 < sum(stats.head_epsilons) * 2


def test_spending_is_a_dictionary_and_a_number() -> None:
    module = DPFlashAttention(E, H, 1.0, DELTA, ledger=Ledger.memory())
    module(words(2, 5, E))
    spent = module.get_privacy_spent()
    assert spent.keys() >= SPENT
    assert float(spent) == spent["total_epsilon"] > 0.9
    assert (type(spent["total_delta"]), type(spent["forward_count"])) == (float, int)
    assert json.loads(json.dumps(spent)) == spent


def test_noise_and_clip_are_overridden_and_the_ledger_shows_it() -> None:
    module = DPFlashAttention(E, H, 1.0, DELTA, ledger=Ledger.memory())
    module.set_noise_multiplier(7.0)
    module.set_clip_norm(0.25)
    _, stats = module(words(2, 5, E), return_privacy_stats=True)
    assert stats.noise_multiplier == 7.0
    assert stats.noise_std == pytest.approx(7.0 * 2 * 0.25 * math.sqrt(5 * H), rel=1e-4)
    event = next(iter(module._calls.ledger.events()))[0]
    assert event.events[0].noise_multiplier == 7.0


def test_stats_format_and_the_private_norm_is_withheld() -> None:
    _, stats = DPFlashAttention(E, H, ledger=Ledger.memory())(words(2, 5, E), return_privacy_stats=True)
    assert f"{stats.epsilon_spent:.2f} {stats.epsilon_spent:.3f} {stats.grad_norm:.2f}" == "1.00 1.000 nan"
    assert stats.privacy_mechanism == "gaussian"


def test_the_enhanced_module_is_a_superset() -> None:
    assert issubclass(EnhancedDPFlashAttention, DPFlashAttention)
    assert issubclass(EnhancedDPFlashAttention, DPCheckpointedAttention)


@pytest.mark.parametrize("name", ["pld", "structured_noise", "standard"])
def test_privacy_mechanism_is_mechanism(name: str) -> None:
    assert enhanced(privacy_mechanism=name).noise_mechanism == enhanced(mechanism=name).noise_mechanism == name
    with pytest.raises(PrivacyParameterError, match="which means the same"):
        enhanced(privacy_mechanism=name, mechanism="laplace")


@pytest.mark.parametrize(
    ("structure", "parameters"),
    [
        ("low_rank", {"rank": 16}),
        ("sparse", {"sparsity": 0.9}),
        ("attention_aware", {}),
        ("block_diagonal", {"block_size": 32}),
    ],
)
def test_each_noise_structure_releases_within_its_promise(structure: str, parameters: dict[str, float]) -> None:
    _, stats = enhanced(noise_structure=structure, **parameters)(words(2, 5, E), return_privacy_stats=True)
    assert stats.privacy_mechanism.startswith(structure)
    assert 0.9 < stats.epsilon_spent <= 1.0


@pytest.mark.parametrize(("method", "accountant"), [("pld", "pld"), ("renyi", "rdp")])
def test_the_composition_method_answers_with_another_librarys_number(method: str, accountant: str) -> None:
    module = enhanced(epsilon=0.5, delta=1e-7, mechanism="gaussian", composition_method=method)
    for _ in range(3):
        module(words(2, 5, E))
    spent = module.get_privacy_spent()
    assert spent["composition_method"] == accountant
    ((event, count),) = module._calls.ledger.events()
    noise, end = event.events
    theirs = pld.PLDAccountant() if method == "pld" else rdp.RdpAccountant()
    theirs.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise.noise_multiplier), count))
    expected = theirs.get_epsilon(DELTA - count * end.delta)
    if method == "pld":
        assert float(spent) == pytest.approx(expected, rel=1e-6)
    else:
        # ours takes the best of all orders, theirs the best of some
        assert expected * (1 - 1e-3) < float(spent) <= expected * (1 + 1e-6)


def test_adaptation_is_charged_and_without_it_the_noise_is_constant() -> None:
    still = enhanced(sensitivity_analysis=True, adaptive_noise=False)
    assert len({still(words(2, 5, E), return_privacy_stats=True)[1].noise_std for _ in range(3)}) == 1
    moving = enhanced(sensitivity_analysis=True, adaptive_noise=True)
    moving(words(2, 5, E))
    assert len(list(still._calls.ledger.releases())) == 3
    assert len(list(moving._calls.ledger.releases())) == 2


def test_noise_on_scores_costs_everything_unless_values_are_public() -> None:
    options = {"noise_site": "scores", "mechanism": "gaussian", "logit_bound": 1.0}
    x, memory = words(2, 5, E), words(2, 7, E, seed=1)
    assert enhanced(**options)(x, memory, memory, return_privacy_stats=True)[1].epsilon_spent == math.inf
    public = enhanced(**options, values="public")
    assert public(x, memory, memory, return_privacy_stats=True)[1].epsilon_spent <= 1.0


def test_budgets_of_heads_clip_dropout_dtype_and_device() -> None:
    module = EnhancedDPFlashAttention(
        64, 4, 3.0, DELTA, head_epsilons=[0.5, 1.0] * 2, max_grad_norm=0.8, dropout=0.0, dtype=torch.float16,
        device="cpu", ledger=Ledger.memory(),
    )  # fmt: skip
    assert module(words(2, 5, 64, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(PrivacyParameterError, match="head_epsilons must hold 4 numbers"):
        EnhancedDPFlashAttention(64, 4, head_epsilons=[1.0])
    with pytest.raises(PrivacyParameterError, match="dropout must be 0"):
        EnhancedDPFlashAttention(64, 4, dropout=0.1)
    assert EnhancedDPFlashAttention(64, 4, dropout=0.1, setting="training").dropout == 0.1


def test_checkpoints_and_autocast_and_options_that_do_not_exist() -> None:
    plain = enhanced(epsilon=math.inf, upstream_gradients="allow")
    module = enhanced(epsilon=math.inf, upstream_gradients="allow", checkpoint_gradients=True, segments=4)
    module.load_state_dict(plain.state_dict())
    x = words(4, 5, E).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(module(x).square().sum(), x), torch.autograd.grad(plain(x).square().sum(), x)
    )
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="did you mean 'segments'"):
        enhanced(segment=4)


def test_a_fragment_without_a_size_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="'embed_dim' and 'num_heads'"):
        EnhancedDPFlashAttention(mechanism="pld", composition_method="pld")


def test_research_components_are_initialised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    real = EnhancedDPFlashAttention._init_research_components
    monkeypatch.setattr(
        EnhancedDPFlashAttention, "_init_research_components", lambda self: (runs.append(1), real(self))[1]
    )
    enhanced()
    assert runs == [1]


def test_the_toggle_is_seen_in_the_analysis_which_is_json_with_all_keys() -> None:
    module = enhanced(noise_structure="low_rank", composition_method="pld")
    module(words(2, 5, E))
    for state in (True, False):
        module.enable_adaptive_noise(state)
        analysis = json.loads(json.dumps(module.export_privacy_analysis()))
        assert analysis["configuration"]["adaptive_noise"] is state
    assert analysis["configuration"].keys() >= {"privacy_mechanism", "noise_structure", "composition_method"}
    assert analysis["privacy_spent"].keys() >= SPENT
    features = {"pld_available", "structured_noise_available", "sensitivity_analysis_available"}
    assert analysis["research_features"].keys() == features
    assert analysis["performance_stats"]["forward_pass"]["avg_time"] > 0


def test_performance_is_measured() -> None:
    module = enhanced()
    module(words(2, 5, E))
    found = module.get_performance_stats()
    assert 0 < found["forward_pass"]["avg_time"] < 60_000
    assert found["memory_usage"] > 1


def test_a_reset_needs_a_reason_and_keeps_the_lifetime() -> None:
    module = enhanced()
    module(words(2, 5, E))
    with pytest.raises(PrivacyParameterError, match="reason must say why"):
        module.reset_privacy_accounting()
    module.reset_privacy_accounting(reason="the next group of patients")
    spent = module.get_privacy_spent()
    assert spent["total_epsilon"] == 0.0 < 0.9 < spent["lifetime_epsilon"]


def test_the_factory_makes_the_enhanced_module() -> None:
    module = create_enhanced_dp_flash_attention(
        embed_dim=E, num_heads=H, epsilon=1.0, delta=DELTA, mechanism="pld", noise_structure="low_rank",
        sensitivity_analysis=True, composition_method="pld",
    )  # fmt: skip
    assert type(module) is EnhancedDPFlashAttention


@pytest.mark.parametrize("kind", PrivacyMechanismType)
def test_every_mechanism_type_constructs(kind: PrivacyMechanismType) -> None:
    assert create_research_mechanism(kind).calibrate(1.0, 1e-6) > 0


def test_the_call_takes_flash_attentions_arguments() -> None:
    q, k, v = words(2, 5, 4, 8), words(2, 7, 2, 8, seed=1), words(2, 7, 2, 8, seed=2)
    exact = dp_flash_attn_func(
        q, k, v, 0.0, softmax_scale=0.3, causal=True, window_size=(-1, -1), softcap=5.0, deterministic=True,
        return_attn_probs=False, epsilon=math.inf, delta=0.0, ledger=Ledger.memory(),
    )  # fmt: skip
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.3
    ahead = torch.ones(5, 7, dtype=torch.bool).triu(3)
    weights = (5.0 * torch.tanh(logits / 5.0)).masked_fill(ahead, -math.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    noised = dp_flash_attn_func(q, k, v, causal=True, epsilon=1.0, delta=DELTA, ledger=Ledger.memory())
    assert noised.shape == q.shape
    with pytest.raises(NotPrivateError):
        dp_flash_attn_func(q, k, v, epsilon=1.0, delta=DELTA, return_attn_probs=True)


def test_a_checkpointed_module_releases_once() -> None:
    ledger = Ledger.memory()
    module = DPCheckpointedAttention(
        E, H, epsilon=1.0, checkpoint_gradients=True, segments=4, upstream_gradients="allow", ledger=ledger
    )
    module(words(4, 5, E)).sum().backward()
    assert module.in_proj_weight.grad.any()  # type: ignore[union-attr]
    assert len(list(ledger.releases())) == 1


def test_diagnostics_report_and_never_raise() -> None:
    assert dp_flash_attention.cuda_version() is None or torch.cuda.is_available()
    assert callable(dp_flash_attention.privacy_check)  # what it checks, test_public_names.py runs


def test_the_state_of_torchs_module_loads() -> None:
    enhanced().load_state_dict(nn.MultiheadAttention(E, H, batch_first=True).state_dict())
