"""``dpfa plan train``: of four quantities the one left out, found and told truly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dpfa_core.events import Gaussian, PoissonSampled, SelfComposed
from dpfa_core.spending import upper_bound, within

SMALL: dict[str, Any] = {"delta": 1e-5, "records": 1000}


def options(given: dict[str, Any]) -> list[Any]:
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]


def event(batch_size: int, steps: int, noise_multiplier: float) -> SelfComposed:
    return SelfComposed(PoissonSampled(batch_size / 1000, Gaussian(noise_multiplier)), steps)


def test_the_epsilon_of_a_training_is_what_each_accountant_says(dpfa):
    plan = dpfa(
        "plan", "train", *options(SMALL | {"noise_multiplier": 2, "batch_size": 20, "steps": 50}), "--json"
    ).json
    assert plan["solved_for"] == "epsilon"
    assert set(plan["epsilons"]) | set(plan["no_bound"]) >= {"gdp", "rdp", "pld", "prv"}
    assert len(plan["epsilons"]) >= 2
    for name, value in plan["epsilons"].items():
        assert value == pytest.approx(upper_bound(name, ((event(20, 50, 2.0), 1),), 1e-5), rel=1e-6)
    assert plan["epsilon"] == min(plan["epsilons"].values())


@pytest.mark.parametrize(
    ("given", "solved_for"),
    [
        ({"epsilon": 0.3, "batch_size": 20, "epochs": 1}, "noise_multiplier"),
        ({"epsilon": 0.3, "batch_size": 20, "noise_multiplier": 2}, "steps"),
        ({"epsilon": 0.3, "noise_multiplier": 2, "steps": 40}, "batch_size"),
        ({"epsilon": 0.3, "noise_multiplier": 2, "epochs": 1}, "batch_size"),
    ],
)
def test_what_is_left_out_is_found_and_keeps_epsilon_and_a_little_more_would_not(dpfa, given, solved_for):
    done = dpfa("plan", "train", *options(SMALL | given), "--json")
    assert done.code == 0, done.err
    plan = done.json
    assert plan["solved_for"] == solved_for
    z, b, steps = plan["noise_multiplier"], plan["batch_size"], plan["steps"]
    for name, value in given.items():
        assert plan["target_epsilon" if name == "epsilon" else name] == value
    if "epochs" in given:
        assert steps == math.ceil(1000 / b)
    assert plan["epsilon"] <= 0.3
    assert plan["sampling_probability"] >= b / 1000
    more = {
        "noise_multiplier": event(b, steps, 0.999 * z),
        "steps": event(b, steps + 1, z),
        "batch_size": event(b + 1, given.get("steps") or math.ceil(1000 / (b + 1)), z),
    }[solved_for]
    assert not within(((more, 1),), 1e-5, 0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"epsilon": 1, "batch_size": 20, "epochs": 1, "noise_multiplier": 1},
            "batch_size, steps; leave out the one that you want to know.",
        ),
        ({"epsilon": 1, "batch_size": 20}, "got epsilon, batch_size; add what is missing."),
        ({}, "got none of them"),
        (
            {"epsilon": 1, "batch_size": 20, "epochs": 1, "steps": 5},
            "either epochs or steps must be given, got epochs=1 and steps=5",
        ),
        ({"epsilon": 0, "batch_size": 20, "epochs": 1}, "epsilon must be a finite number > 0, got 0.0."),
        ({"epsilon": -1, "batch_size": 20, "epochs": 1}, "epsilon must be a finite number > 0, got -1.0."),
        ({"epsilon": "nan", "batch_size": 20, "epochs": 1}, "epsilon must be a finite number > 0, got nan."),
        ({"epsilon": "inf", "batch_size": 20, "epochs": 1}, "epsilon must be a finite number > 0, got inf."),
        ({"noise_multiplier": "nan", "batch_size": 20, "epochs": 1}, "noise_multiplier must be a finite number > 0"),
        ({"epsilon": 1, "batch_size": 1001, "epochs": 1}, "batch_size must not exceed the 1000 records, got 1001."),
        ({"epsilon": 1, "batch_size": 20, "epochs": 0}, "epochs must be an integer >= 1, got 0."),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "delta": 0}, "delta must be in (0, 1), got 0.0."),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "delta": 1.5}, "delta must be in (0, 1), got 1.5."),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "delta": "nan"}, "delta must be in (0, 1), got nan."),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "unit": "person"}, "unit must be one of 'example', 'user'"),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "optimizer": "best"}, "optimizer must be one of 'sgd'"),
        ({"epsilon": 1, "batch_size": 20, "epochs": 1, "plot": "plan.svg"}, "plot must be the name of a .png file"),
        (
            {"epsilon": 1, "batch_size": 20, "epochs": 1, "plot": "no/such/a.png"},
            "plot must lie in a folder that exists",
        ),
        ({"epsilon": 1e-6, "noise_multiplier": 2, "batch_size": 20}, "at one step the release still costs more"),
        ({"epsilon": 1e-6, "noise_multiplier": 2, "steps": 2}, "epsilon must be one that a batch of 1 keeps"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(dpfa, given, message):
    done = dpfa("plan", "train", *options(SMALL | given), "--json")
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_warnings_are_plain_and_only_where_they_are_true(dpfa):
    sound = {"noise_multiplier": 2, "batch_size": 20, "steps": 1, "parameters": 100}
    assert dpfa("plan", "train", *options(SMALL | sound), "--json").json["warnings"] == []
    bad = sound | {"noise_multiplier": 0.3, "steps": 300, "delta": 0.01, "parameters": 10**6}
    plan = dpfa("plan", "train", *options(SMALL | bad), "--json").json
    assert plan["epsilon"] > 10.0
    texts = plan["warnings"]
    assert [text.split()[0:3] for text in texts] == [
        ["Epsilon", "is", "above"],
        ["Delta", "is", "above"],
        ["The", "batch", "is"],
    ]
    assert "at a batch of 300," in texts[2]
    assert plan["signal_to_noise"] == pytest.approx(20 / (0.3 * 1000))


def test_memory_follows_from_the_shapes_and_time_is_never_guessed(dpfa):
    given = SMALL | {"noise_multiplier": 2, "batch_size": 20, "steps": 10}
    plan = dpfa("plan", "train", *options(given), "--json").json
    assert (plan["memory_bytes"], plan["seconds"], plan["signal_to_noise"]) == (None, "not measured", None)
    told = given | {"parameters": 1000, "optimizer": "momentum", "seconds_per_step": 0.5}
    plan = dpfa("plan", "train", *options(told), "--json").json
    assert plan["memory_bytes"] == {
        "weights": 4000,
        "gradient": 4000,
        "optimizer": 4000,
        "noise": 4000,
        "total": 16000,
    }
    assert plan["seconds"] == 5.0


def test_the_table_shows_every_accountant_and_rounds_to_the_private_side(dpfa):
    given = SMALL | {"epsilon": 0.2, "batch_size": 20, "steps": 10, "parameters": 5000, "unit": "user"}
    plan = dpfa("plan", "train", *options(given), "--json").json
    done = dpfa("plan", "train", *options(given))
    assert done.code == 0, done.err
    shown = {line.split()[0]: line.split()[1] for line in done.out.splitlines() if line[:3] in plan["epsilons"]}
    assert set(shown) == set(plan["epsilons"])
    for name, text in shown.items():
        assert plan["epsilons"][name] <= float(text) <= plan["epsilons"][name] * 1.001
    (noise,) = (float(line.split()[-1]) for line in done.out.splitlines() if line.startswith("noise multiplier"))
    assert plan["noise_multiplier"] <= noise <= plan["noise_multiplier"] * 1.001
    (ratio,) = (float(line.split()[-1]) for line in done.out.splitlines() if line.startswith("signal / noise"))
    assert plan["signal_to_noise"] * 0.99 <= ratio <= plan["signal_to_noise"]
    for text in (
        "one user, add or remove",
        "gdp: ",
        "not measured (pass --seconds-per-step)",
        "100 kB (weights 20 kB, gradient 20 kB, optimizer 40 kB",
    ):
        assert text in done.out


def test_the_picture_is_drawn(dpfa, tmp_path: Path):
    path = tmp_path / "plan.png"
    given = SMALL | {"noise_multiplier": 2, "batch_size": 20, "steps": 32, "plot": path}
    done = dpfa("plan", "train", *options(given), "--json")
    assert done.code == 0, done.err
    assert done.json["plot"] == str(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000
