"""``dpfa plan release``: the noise of private attention calls, before there is a tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dp_flash_attention.planning.options import parameters_of
from dpfa_core.events import Composed, EpsilonDelta, Gaussian, Laplace
from dpfa_core.registry import MECHANISMS
from dpfa_core.spending import upper_bound

CALL: dict[str, Any] = {"delta": 1e-6, "q_len": 32, "epsilon": 1}
TOKEN: dict[str, Any] = CALL | {"unit": "token", "queries": "public", "logit_bound": 0.5}


def options(given: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for name, value in given.items():
        parts.append(f"--{name.replace('_', '-')}")
        parts += [] if value is True else [value]
    return parts


@pytest.fixture
def plan(dpfa):
    def plan(given: dict[str, Any]) -> dict[str, Any]:
        done = dpfa("plan", "release", *options(given), "--json")
        assert done.code == 0, done.err
        return done.json

    return plan


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


@pytest.mark.parametrize(
    ("mechanism", "dtype", "causal"),
    [("gaussian", "float32", False), ("laplace", "float32", False), ("pld", "bfloat16", True)],
)
def test_the_plan_is_what_a_call_does(plan, mechanism, dtype, causal):
    import torch

    from dpfa_attention import dp_flash_attn_func
    from dpfa_core.ledger import Ledger

    given = CALL | {"q_len": 8, "head_dim": 16, "batch": 2, "heads": 4, "kv_heads": 2, "clip_norm": 0.5}
    planned = plan(given | {"mechanism": mechanism, "dtype": dtype} | ({"causal": True} if causal else {}))
    q, k, v = (torch.zeros(2, 8, heads, 16, dtype=getattr(torch, dtype)) for heads in (4, 2, 2))
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-6)
    options = {"epsilon": 1.0, "delta": 1e-6, "clip_norm": 0.5, "mechanism": mechanism, "causal": causal}
    _, stats = dp_flash_attn_func(q, k, v, **options, ledger=ledger, return_privacy_stats=True)
    # a call adds a hair where accounting rounds up
    assert stats.noise_multiplier / (1 + 1e-9) <= planned["noise_multiplier"] <= stats.noise_multiplier
    assert planned["noise_std"] == pytest.approx(stats.noise_std, rel=1e-9)
    assert 0.999 < planned["epsilon"] <= 1.0 >= stats.epsilon_spent
    ((event, count),) = ledger.events()
    kind = Laplace if mechanism == "laplace" else Gaussian
    end = pytest.approx(planned["sampler_end_delta"], rel=1e-9)
    assert (event, count) == (Composed((kind(stats.noise_multiplier), event.events[1])), 1)
    assert (event.events[1].epsilon, event.events[1].delta) == (0.0, end)


def test_noise_from_epsilon_and_epsilon_from_noise_are_inverse(plan):
    forth = plan(TOKEN)
    assert (forth["solved_for"], forth["target_epsilon"]) == ("noise_multiplier", 1.0)
    back = plan(without(TOKEN, "epsilon") | {"noise_multiplier": repr(forth["noise_multiplier"])})
    assert back["solved_for"] == "epsilon"
    assert back["epsilons"] == pytest.approx(forth["epsilons"], rel=1e-9)
    assert forth["epsilon"] <= 1.0 < back["epsilon"] + 1e-6


def test_many_calls_compose_and_a_total_epsilon_is_kept(plan):
    one = plan(TOKEN | {"calls": 30})
    event = Composed((Gaussian(one["noise_multiplier"]), EpsilonDelta(0.0, one["sampler_end_delta"])))
    assert set(one["total_epsilons"]) >= {"gdp", "rdp"}
    for name, value in one["total_epsilons"].items():
        assert value == pytest.approx(upper_bound(name, ((event, 30),), 1e-6), rel=1e-9)
    assert 1.0 < one["total_epsilon"] == min(one["total_epsilons"].values()) < 30.0
    total = plan(without(TOKEN, "epsilon") | {"calls": 30, "total_epsilon": 3})
    assert 2.999 < total["total_epsilon"] <= 3.0
    assert total["noise_multiplier"] > one["noise_multiplier"]
    assert total["epsilon"] < one["epsilon"]


def test_what_the_sensitivity_analysis_saves_is_told_in_percent(plan):
    told = plan(TOKEN)
    ratio = told["sensitivity"] / told["sensitivity_naive"]
    assert ratio == pytest.approx(0.912 / 11.31, rel=1e-2)
    assert told["saved_by_sensitivity_percent"] == pytest.approx(100 * (1 - ratio))
    assert told["saved_noise_energy_percent"] == pytest.approx(100 * (1 - ratio**2), rel=1e-4)
    whole = plan(CALL)
    assert whole["saved_by_sensitivity_percent"] == whole["saved_noise_energy_percent"] == 0.0
    assert any("worst key" in sentence for sentence in told["explanation"])


@pytest.mark.parametrize(("mechanism", "variance"), [("gaussian", 1.0), ("laplace", 2.0)])
def test_signal_to_noise_is_a_clipped_rows_element_over_the_noise_std(plan, mechanism, variance):
    told = plan(CALL | {"mechanism": mechanism, "clip_norm": 3, "head_dim": 16})
    assert told["noise_std"] == pytest.approx(told["noise_scale"] * math.sqrt(variance))
    assert told["signal_to_noise"] == pytest.approx(3 / 4 / told["noise_std"])


def test_a_window_bounds_how_many_rows_a_token_moves(plan):
    wide, narrow = plan(TOKEN | {"q_len": 64, "causal": True}), plan(TOKEN | {"q_len": 64, "window": "7,0"})
    assert narrow["sensitivity"] != wide["sensitivity"]
    longer = plan(TOKEN | {"q_len": 256, "window": "7,0"})
    assert longer["sensitivity"] == pytest.approx(narrow["sensitivity"], rel=1e-3)
    assert longer["sensitivity_naive"] == pytest.approx(2 * narrow["sensitivity_naive"], rel=1e-3)


def test_memory_counts_the_tensors_and_time_is_never_guessed(plan):
    told = plan(CALL | {"batch": 2, "kv_len": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "bfloat16"})
    out, keys = 2 * 32 * 4 * 16, 2 * 8 * 2 * 16
    parts = {"q": 2 * out, "k": 2 * keys, "v": 2 * keys, "out": 2 * out, "noise": 4 * out}
    assert told["memory_bytes"] == parts | {"total": sum(parts.values())}
    assert (told["noise_draws"], told["seconds"]) == (out, "not measured")
    assert plan(CALL | {"calls": 7, "seconds_per_call": 2})["seconds"] == 14


def test_warnings_are_plain_and_only_where_they_are_true(plan):
    assert plan(TOKEN | {"q_len": 64, "head_dim": 1, "logit_bound": 0.01, "epsilon": 9})["warnings"] == []
    starts = [text.split(":")[0] for text in plan(TOKEN | {"epsilon": 10.2, "delta": 0.2})["warnings"]]
    assert starts[:2] == ["Epsilon is above 10", "Delta is above 1 / 32 tokens of a call"]
    assert plan(CALL)["warnings"][0].startswith("The noise is louder than the signal")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without(CALL, "epsilon"), "must be given, got none of them; what is left out is solved for."),
        (CALL | {"noise_multiplier": 1}, "must be given, got epsilon and noise_multiplier;"),
        (CALL | {"epsilon": 0}, "epsilon must be a finite number > 0, got 0.0."),
        (CALL | {"epsilon": "nan"}, "epsilon must be a finite number > 0, got nan."),
        (CALL | {"epsilon": "inf"}, "epsilon must be a finite number > 0, got inf."),
        (CALL | {"delta": 0}, "delta must be in (0, 1), got 0.0."),
        (CALL | {"delta": 1}, "delta must be in (0, 1), got 1.0."),
        (CALL | {"delta": "nan"}, "delta must be in (0, 1), got nan."),
        (CALL | {"delta": 1e-300}, "what the end of the noise sampler costs at this size in float32"),
        (without(CALL, "epsilon") | {"noise_multiplier": 0.01}, "whose end costs 1 at this size in float32; take"),
        (
            without(CALL, "epsilon") | {"total_epsilon": 1, "calls": 10**9, "delta": 1e-12},
            "the release still costs more",
        ),
        (CALL | {"unit": "person"}, "unit must be one of 'sequence', 'token'"),
        (CALL | {"unit": "example"}, 'an attention release protects unit="sequence" or "token", got \'example\''),
        (CALL | {"unit": "token"}, 'needs queries="public" or "private"'),
        (CALL | {"relation": "swap"}, "relation must be one of"),
        (CALL | {"window": "5"}, "window must be two integers LEFT,RIGHT with -1 for unlimited, got '5'."),
        (CALL | {"window": "5,x"}, "window must be two integers LEFT,RIGHT"),
        (CALL | {"window": "-2,0"}, "a window side must be an integer >= -1, got -2."),
        (CALL | {"clip": "query"}, "clip must be one of 'value', 'output', got 'query'."),
        (CALL | {"clip_norm": "nan"}, "clip_norm must be a finite number > 0, got nan."),
        (CALL | {"heads": 3, "kv_heads": 2}, "q_heads must be a multiple of kv_heads=2, got 3."),
        (CALL | {"calls": 0}, "calls must be an integer >= 1, got 0."),
        (CALL | {"dtype": "int8"}, "dtype must be one of"),
        (CALL | {"mechanism": "gausian"}, "gausian"),
        (CALL | {"mechanism": "laplace", "noise_structure": "low_rank"}, "shapes Gaussian noise and clips in l2"),
        (CALL | {"mechanism": "laplace", "parameter": "rank=4"}, "could not be created with {'rank': 4}"),
        (CALL | {"parameter": "rank"}, "parameter must be name=value, got 'rank'."),
    ],
)
def test_bad_input_is_refused_in_one_sentence(dpfa, given, message):
    done = dpfa("plan", "release", *options(given), "--json")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_plan_with_less_noise_than_its_event_says_is_not_shown(dpfa, monkeypatch):
    from dpfa_mechanisms.gaussian import Gaussian as Mechanism

    honest = Mechanism.plan

    def short(self, sensitivity, noise_multipliers, problem):
        return honest(self, sensitivity, tuple(0.99 * z for z in noise_multipliers), problem)

    assert dpfa("plan", "release", *options(CALL), "--json").code == 0
    monkeypatch.setattr(Mechanism, "plan", short)
    done = dpfa("plan", "release", *options(CALL), "--json")
    assert (done.code, done.out) == (2, "")
    assert "must plan noise of multiplier" in done.err


def test_the_table_says_all_of_it(dpfa, tmp_path):
    path = tmp_path / "plan.png"
    done = dpfa("plan", "release", *options(TOKEN | {"calls": 4, "plot": path}))
    assert done.code == 0, done.err
    header = next(line.split() for line in done.out.splitlines() if line.startswith("accountant"))
    assert header == ["accountant", "one", "call", "all", "calls"]
    for text in ("0.9122 by P3.token.public", "one token, replace, queries public", "91.9 % of", "99.3 % of", "pld"):
        assert text in done.out
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_parameter_that_reads_as_a_number_or_a_truth_is_one():
    found = parameters_of(["rank=16", "sparsity=0.5", "rescale=true", "kind=fast"])
    assert found == {"rank": 16, "sparsity": 0.5, "rescale": True, "kind": "fast"}
    assert [type(value) for value in found.values()] == [int, float, bool, str]


STRUCTURES = [
    ("low_rank", "rank=8"),
    ("sparse", "sparsity=0.75"),
    ("block_diagonal", None),
    ("attention_aware", None),
]


@pytest.mark.parametrize(("structure", "parameter"), STRUCTURES)
def test_a_structure_is_planned_with_its_parameters_and_says_what_it_saves(plan, structure, parameter):
    if structure not in {entry.name for entry in MECHANISMS.entries()}:
        pytest.skip(f"no mechanism {structure!r} is installed")
    given = TOKEN | {"noise_structure": structure, "causal": True} | ({"parameter": parameter} if parameter else {})
    told = plan(given)
    assert told["mechanism"] == structure
    assert told["epsilon"] <= min(told["epsilons"].values()) <= 1.0
    assert told == plan(without(given, "noise_structure") | {"mechanism": structure})
    plain = plan(TOKEN | {"causal": True})
    assert told["saved_noise_energy_percent"] is not None
    assert told["saved_noise_energy_percent"] >= plain["saved_noise_energy_percent"] - 1e-9
