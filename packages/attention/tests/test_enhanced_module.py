from __future__ import annotations

import copy
import itertools
import json
import math
import time
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting import pld, rdp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpfa_attention import adaptive_clip, enhanced_module
from dpfa_attention.enhanced_module import EnhancedDPFlashAttention, create_enhanced_dp_flash_attention
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.projection import projected
from dpfa_attention.release_paths import check_release_paths
from dpfa_core.errors import BudgetExhausted, NotPrivateError, PrivacyParameterError
from dpfa_core.events import Composed, DiscreteGaussian, Gaussian
from dpfa_core.ledger import Ledger
from dpfa_core.spending import spending

E, H = 32, 2
DELTA = 1e-5
ORDERS = [1.0 + 0.01 * step for step in range(100, 3000)]
"""Finer than that library's own."""


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(epsilon: float | None = 1.0, **options: Any) -> EnhancedDPFlashAttention:
    torch.manual_seed(0)
    options.setdefault("ledger", Ledger.memory(delta=DELTA))
    return EnhancedDPFlashAttention(E, H, epsilon, DELTA, **options)


def test_it_is_the_base_and_more() -> None:
    base = DPFlashAttention(E, H, math.inf, 0.0, ledger=Ledger.memory())
    ours = EnhancedDPFlashAttention(E, H, math.inf, 0.0, ledger=Ledger.memory())
    ours.load_state_dict(base.state_dict())
    assert isinstance(ours, DPFlashAttention)
    assert torch.equal(ours(words(2, 6, E)), base(words(2, 6, E)))
    made = create_enhanced_dp_flash_attention(E, H, 2.0, 1e-6, "standard", "sparse", False, "renyi", causal=True)
    assert type(made) is EnhancedDPFlashAttention
    assert (made.epsilon, made.delta, made.noise_structure, made.causal) == (2.0, 1e-6, "sparse", True)


def test_the_hook_runs_once() -> None:
    class Counted(EnhancedDPFlashAttention):
        runs = 0

        def _init_research_components(self) -> None:
            self.runs += 1
            super()._init_research_components()

    assert Counted(E, H, segments=2, checkpoint_gradients=True).runs == 1


@pytest.mark.parametrize("name", ["privacy_mechanism", "mechanism", "noise_mechanism"])
def test_the_mechanism_has_three_names_that_must_agree(name: str) -> None:
    assert module(**{name: "standard"}).noise_mechanism == "standard"
    other = "mechanism" if name != "mechanism" else "privacy_mechanism"
    assert module(**{name: "standard", other: "standard"}).noise_mechanism == "standard"
    with pytest.raises(PrivacyParameterError, match="which means the same"):
        module(**{name: "standard", other: "laplace"})
    assert module().noise_mechanism == "pld"


@pytest.mark.parametrize(
    ("options", "mechanism"),
    [
        ({"noise_structure": "low_rank"}, "low_rank"),
        ({"mechanism": "structured_noise", "rank": 4}, "low_rank(rank=4)"),
        ({"noise_structure": "low_rank", "rank": 4}, "low_rank(rank=4)"),
        ({"noise_structure": "sparse", "sparsity": 0.5}, "sparse(sparsity=0.5)"),
        ({"noise_structure": "block_diagonal", "block_size": 8}, "block_diagonal(block_size=8)"),
        ({"mechanism": "pld", "noise_structure": "attention_aware"}, "attention_aware"),
    ],
)
def test_a_structure_and_its_parameters_reach_the_ledger(options: dict[str, Any], mechanism: str) -> None:
    ours = module(**options)
    _, stats = ours(words(2, 6, E), return_privacy_stats=True)
    assert stats.privacy_mechanism == mechanism
    assert 0.9 < stats.epsilon_spent <= 1.0
    assert (stats.unit, ours.logit_bound) == (("token", 1.0) if "aware" in mechanism else ("sequence", None))
    assert ours.get_privacy_spent()["privacy_mechanism"] == mechanism


@pytest.mark.parametrize(("rank", "width"), [(3, 3), (16, 16)])
def test_rank_is_the_rank_of_what_is_released(rank: int, width: int) -> None:
    ours = module(noise_structure="low_rank", rank=rank)
    nn.init.eye_(ours.out_proj.weight)
    out = ours(words(4, 32, E)).detach()
    for head in out.unflatten(-1, (H, -1)).unbind(-2):
        assert torch.linalg.matrix_rank(head.flatten(0, 1), atol=1e-3) == width


def test_sparsity_is_the_share_of_columns_without_noise() -> None:
    ours = module(noise_structure="sparse", sparsity=0.75)
    nn.init.eye_(ours.out_proj.weight)
    columns = ours(words(4, 8, E)).detach().flatten(0, 1).abs().amax(0)
    assert int((columns == 0).sum()) == 24


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"rank": 17, "noise_structure": "low_rank"},
            PrivacyParameterError,
            "rank must be an integer from 1 to head_d",
        ),
        ({"rank": 0, "mechanism": "low_rank"}, PrivacyParameterError, "rank must be an integer from 1"),
        ({"rank": 4}, PrivacyParameterError, "rank needs noise_structure='low_rank'"),
        ({"sparsity": 0.5, "noise_structure": "low_rank"}, PrivacyParameterError, "sparsity needs noise_structure='sp"),
        ({"sparsity": 1.0, "noise_structure": "sparse"}, PrivacyParameterError, r"sparsity must be in \[0, 1\)"),
        ({"block_size": 0, "noise_structure": "block_diagonal"}, PrivacyParameterError, "block_size must be an int"),
        ({"noise_structure": "diagonal"}, PrivacyParameterError, "noise_structure must be one of"),
        ({"mechanism": "laplace", "noise_structure": "sparse"}, PrivacyParameterError, "shapes Gaussian noise"),
        ({"composition_method": "hope"}, PrivacyParameterError, "composition_method must be one of None, 'renyi'"),
        ({"adaptive_noise": True, "setting": "training"}, PrivacyParameterError, "adaptive noise belongs to"),
        ({"epsilon": math.inf, "adaptive_noise": True}, PrivacyParameterError, "needs a finite epsilon and a delta"),
        ({"compile_kernels": True, "setting": "training"}, PrivacyParameterError, "compile_kernels must be False"),
        ({"dropout": 0.1}, PrivacyParameterError, "dropout must be 0"),
        ({"causual": True}, TypeError, "got an unknown option 'causual'; did you mean 'causal'?"),
        ({"zzzzz": 1}, TypeError, "got an unknown option 'zzzzz'; it has adaptive_noise, allow_infinite_heads"),
    ],
)
def test_what_no_call_could_use_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        module(**options)(words(2, 6, E))


def test_rank_sixteen_needs_sixteen_columns() -> None:
    with pytest.raises(PrivacyParameterError, match=r"from 1 to head_dim=8 .*got 16. Give a smaller rank"):
        EnhancedDPFlashAttention(16, 2, noise_structure="low_rank")
    with pytest.raises(TypeError, match=r"embed_dim.*num_heads"):
        EnhancedDPFlashAttention(noise_structure="low_rank")  # type: ignore[call-arg]


def test_arguments_of_the_base_may_come_in_its_order() -> None:
    ours = EnhancedDPFlashAttention(E, H, 2.0, 1e-6, 0.5, None, None, "laplace", "cpu", torch.float64)
    assert (ours.epsilon, ours.delta, ours.clip_norm, ours.noise_mechanism) == (2.0, 1e-6, 0.5, "laplace")
    assert ours.out_proj.weight.dtype == torch.float64
    with pytest.raises(PrivacyParameterError, match="noise_mechanism must equal mechanism='pld'"):
        EnhancedDPFlashAttention(E, H, 2.0, 1e-6, None, None, None, "laplace", mechanism="pld")


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("pld", pld.PLDAccountant), ("renyi", lambda: rdp.RdpAccountant(ORDERS))],
    ids=["pld", "renyi"],
)
def test_the_composition_method_is_the_accountant_and_agrees_with_another_library(method: str, theirs: Any) -> None:
    ledger = Ledger.memory(delta=DELTA)
    ours = EnhancedDPFlashAttention(E, H, 0.5, 1e-7, mechanism="gaussian", composition_method=method, ledger=ledger)
    for _ in range(3):
        ours(words(2, 6, E))
    spent = ours.get_privacy_spent()
    assert spent["composition_method"] == {"renyi": "rdp"}.get(method, method)
    # the sampler's end is a delta of its own, which their accountant is asked without
    event = next(iter(ledger.events()))[0]
    gaussian, end = event.events
    left = DELTA - 3 * end.delta
    count = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(gaussian.noise_multiplier), 3)
    expected = theirs().compose(count).get_epsilon(left)
    assert float(spent) == pytest.approx(expected, rel=1e-6)


def test_heads_have_their_budgets_and_the_list_may_be_repeated() -> None:
    ours = EnhancedDPFlashAttention(
        E, 8, 3.0, DELTA, privacy_mechanism="structured_noise", noise_structure="attention_aware",
        head_epsilons=[0.5, 1.0, 1.0, 2.0] * 2, max_grad_norm=0.8, ledger=Ledger.memory(),
    )  # fmt: skip
    _, stats = ours(words(2, 6, E), return_privacy_stats=True)
    assert len(stats.head_epsilons) == 8
    assert stats.head_epsilons[0] < stats.head_epsilons[3]
    assert 2.9 < stats.epsilon_spent <= 3.0
    with pytest.raises(PrivacyParameterError, match="head_epsilons must hold 2 numbers"):
        module(head_epsilons=[1.0])


# ---- adaptive noise


def test_without_adaptive_noise_clip_and_noise_are_constant() -> None:
    ours = module(max_grad_norm=0.8)
    stds = {ours(words(2, 6, E, seed=seed), return_privacy_stats=True)[1].noise_std for seed in range(3)}
    assert len(stds) == 1
    assert ours.clip_norm == 0.8
    assert len(list(ours._calls.ledger.releases())) == 3


def test_a_call_with_adaptive_noise_is_a_count_and_a_release_that_keep_the_promise_together() -> None:
    ours = module(adaptive_noise=True)
    _, stats = ours(words(4, 6, E), return_privacy_stats=True)
    lines = list(ours._calls.ledger.releases())
    assert [line.mechanism for line in lines] == ["discrete_gaussian", "gaussian"]
    count, release = (line.event for line in lines)
    assert isinstance(count, DiscreteGaussian)
    assert isinstance(release, Composed)
    assert isinstance(release.events[0], Gaussian)
    assert spending([(count, 1)], adaptive_clip.SHARE * DELTA).epsilon <= 0.1 * (1 + 1e-9)
    assert spending([(release, 1)], DELTA - adaptive_clip.SHARE * DELTA).epsilon <= 0.9 * (1 + 1e-9)
    assert 0.99 < stats.epsilon_spent <= 1.0
    spent = ours.get_privacy_spent()
    assert (spent["forward_count"], spent.event_id) == (1, stats.event_id)
    assert float(spent) <= 1.0
    assert spent["composition_method"] == "rdp"
    assert stats.delta == DELTA


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_the_clip_follows_the_median_of_the_records(unit: Any) -> None:
    ours = module(
        8.0,
        mechanism="gaussian",
        adaptive_noise=True,
        unit=unit,
        logit_bound=1.0,
        sensitivity_analysis=False,
        max_grad_norm=100.0,
    )
    nn.init.zeros_(ours.in_proj_weight)  # type: ignore[arg-type]
    ours.in_proj_weight.data[2 * E :] = torch.eye(E)  # type: ignore[union-attr]
    x = torch.ones(40, 3, E) * torch.linspace(1.0, 3.0, 40)[:, None, None]
    for _ in range(60):
        ours(x)
    # value rows of one head have 16 columns
    assert ours.clip_norm == pytest.approx(2.0 * 4.0, rel=0.4)
    path = ours.export_privacy_analysis()["clip_norm_path"]
    assert len(path) == 60
    assert path[-1] == ours.clip_norm
    ours.enable_adaptive_noise(False)
    ours(x)
    assert len(ours.export_privacy_analysis()["clip_norm_path"]) == 60


def test_noise_alone_moves_the_clip_no_further_than_records_could() -> None:
    ours, x = module(adaptive_noise=True, max_grad_norm=1.0, sensitivity_analysis=False), words(2, 3, E)
    for _ in range(30):
        ours(x)  # two records, under a count whose noise is ten times as many
    path = [1.0, *ours.export_privacy_analysis()["clip_norm_path"]]
    steps = [math.log(after / before) for before, after in itertools.pairwise(path)]
    assert max(map(abs, steps)) <= 0.1 * (1 + 1e-9)
    assert max(map(abs, steps)) > 0.09


def test_one_record_moves_the_count_by_two_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(batches: Any, quantile: float, **options: Any) -> Any:
        assert options["relation"] == "replace"
        counts.append(sum(1 if value <= options["initial"] else -1 for value in batches[0]))
        return real(batches, quantile, **options)

    real = adaptive_clip.noisy_count_quantile
    monkeypatch.setattr(adaptive_clip, "noisy_count_quantile", counted)
    x = words(3, 5, E)
    for unit, where in (("sequence", (slice(1, 2),)), ("token", (slice(1, 2), slice(2, 3)))):
        counts.clear()
        for value in (0.0, 1e3, 1e30, math.nan, math.inf):
            y = x.clone()
            y[where] = value
            module(adaptive_noise=True, unit=unit, logit_bound=1.0)(y)
        assert max(counts) - min(counts) == 2


def test_padding_is_not_counted() -> None:
    v = torch.ones(2, 4, H, 8) * torch.arange(1.0, 5.0)[:, None, None]
    lengths = ((4, 4), (2, 2))
    found = adaptive_clip.records_norms(v, lengths, unit="sequence", norm="l1")
    assert found == [32.0, 16.0]
    assert len(adaptive_clip.records_norms(v, lengths, unit="token", norm="l2")) == 6


def test_a_spent_budget_stops_the_count_before_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = module(adaptive_noise=True, ledger=Ledger.memory(delta=DELTA, budget=0.05))
    monkeypatch.setattr("dpfa_mechanisms.quantiles.integer_gaussian", lambda *_: pytest.fail("drawn"))
    with pytest.raises(BudgetExhausted):
        ours(words(2, 6, E))
    assert ours.clip_norm is None


def test_a_count_is_never_run_twice_for_one_output() -> None:
    ours = module(adaptive_noise=True, upstream_gradients="allow")
    x = words(2, 6, E).requires_grad_()
    with pytest.raises(NotPrivateError, match="count once for each output"):
        checkpoint(ours, x, use_reentrant=False)
    with pytest.raises(NotPrivateError, match="count once for each output"):
        torch.func.vmap(ours)(words(3, 2, 6, E))
    assert not list(ours._calls.ledger.releases())
    ours.checkpoint_gradients = True
    ours(x).sum().backward()
    assert len(list(ours._calls.ledger.releases())) == 2


def test_a_check_of_release_paths_charges_no_count_and_moves_no_clip() -> None:
    ours = module(adaptive_noise=True, max_grad_norm=1.0)
    report = check_release_paths(ours, words(2, 6, E))
    assert not report.leaks
    assert report.releases
    assert ours.clip_norm == 1.0
    assert not list(ours._calls.ledger.releases())


def test_a_noise_multiplier_set_by_hand_costs_what_it_costs_and_the_count_besides() -> None:
    ours = module(adaptive_noise=True)
    ours.set_noise_multiplier(1.0)
    _, stats = ours(words(2, 6, E), return_privacy_stats=True)
    assert stats.noise_multiplier == 1.0
    assert 4.4 < stats.epsilon_spent < 4.7
    assert ours.get_privacy_spent()["forward_count"] == 1


# ---- analyses and timers


def test_the_analysis_is_json_and_says_what_is_set() -> None:
    ours = module(noise_structure="low_rank", composition_method="pld", unit="token", logit_bound=0.5)
    before = ours.export_privacy_analysis()
    assert before["sensitivity"] is None
    assert before["performance_stats"]["forward_pass"] == {"avg_time": 0.0, "calls": 0}
    ours(words(2, 6, E))
    ours.enable_adaptive_noise(True)
    after = ours.export_privacy_analysis()
    assert json.loads(json.dumps(after)) == after
    chosen = {"privacy_mechanism": "pld", "noise_structure": "low_rank", "composition_method": "pld"}
    assert chosen.items() <= after["configuration"].items()
    assert after["configuration"]["adaptive_noise"] is True
    assert {"total_epsilon", "total_delta", "forward_count"} <= after["privacy_spent"].keys()
    assert set(after["research_features"].values()) == {True}
    assert len(after["sensitivity"]["per_head"]) == H
    assert module(sensitivity_analysis=False).export_privacy_analysis()["sensitivity"] is None


def test_without_a_bound_there_is_no_analysis_and_infinity_is_said() -> None:
    ours = EnhancedDPFlashAttention(E, H, math.inf, 0.0, unit="token", ledger=Ledger.memory(delta=DELTA))
    ours(words(2, 6, E))
    found = ours.export_privacy_analysis()
    assert found["sensitivity"] is None
    assert found["research_features"]["sensitivity_analysis_available"] is False
    assert found["privacy_spent"]["total_epsilon"] == math.inf
    json.dumps(found)


def test_the_average_time_is_that_of_a_clock() -> None:
    ours, x = module(mechanism="gaussian"), words(8, 64, E)
    ours(x)
    ours._timer = type(ours._timer)()
    begin = time.perf_counter()
    for _ in range(20):
        ours(x)
    wall = 1000.0 * (time.perf_counter() - begin)
    found = ours.get_performance_stats()
    assert found["forward_pass"]["calls"] == 20
    assert 0.8 * wall < 20 * found["forward_pass"]["avg_time"] <= wall
    assert 1.0 < found["memory_usage"] < 1e6
    assert copy.deepcopy(ours).get_performance_stats()["forward_pass"]["calls"] == 0
    with pytest.raises(PrivacyParameterError):
        ours(x, attn_mask=torch.eye(63).bool())
    assert ours.get_performance_stats()["forward_pass"]["calls"] == 20


# ---- speed


def test_compiled_projections_have_the_same_output_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    # a compiler for C++ is not on every machine
    compiled = torch.compile(projected, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(enhanced_module, "_compiled_projections", lambda: compiled)
    plain = module(math.inf, upstream_gradients="allow", clip_norm=0.7)
    ours = module(math.inf, upstream_gradients="allow", clip_norm=0.7, compile_kernels=True)
    ours.load_state_dict(plain.state_dict())
    results = []
    for each in (plain, ours):
        x = words(2, 6, E).requires_grad_()
        out = each(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in each.parameters())])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert len(list(ours._calls.ledger.releases())) == 1


@pytest.mark.parametrize("options", [{}, {"checkpoint_gradients": True, "segments": 2}, {"adaptive_noise": True}])
def test_it_runs_under_autocast_and_in_half_precision(options: dict[str, Any]) -> None:
    ours = module(upstream_gradients="allow", noise_structure="low_rank", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(words(2, 6, E))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert ours.in_proj_weight.grad.isfinite().all()  # type: ignore[union-attr]
    half = module(dtype=torch.float16, **options)
    assert half(words(2, 6, E).half()).dtype == torch.float16
