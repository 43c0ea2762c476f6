"""The gate comes before the clock, contenders take turns, and a case runs at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dpfa_training.engine
from dpfa_benchmarks import __main__, runner
from dpfa_benchmarks.case import Contender, GateFailed
from dpfa_benchmarks.cases import CASES
from dpfa_benchmarks.memory import peak_memory
from dpfa_benchmarks.record import Record, read
from dpfa_benchmarks.timing import interleaved


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_case_runs_at_toy_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "peak_memory", lambda *arguments: 1)
    case = CASES[name]
    found = runner.run(case, case.toy, repeats=2, command="a test")
    ours = found.result(case.ours)
    assert ours.seconds is not None
    assert ours.error is not None
    assert ours.error <= case.tolerance
    assert found.fastest_alternative is not None


def test_the_text_model_passes_the_gate() -> None:
    case = CASES["private_step"]
    parameters = runner.with_changes(case, {"model": "text", "batch": 3})
    (ours,) = [c for c in case.contenders(parameters) if c.name == case.ours]
    assert ours.error is not None
    assert ours.error() <= case.tolerance


def test_a_wrong_gradient_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dpfa_training.engine.clipped_sums

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        sums, norms = right(*arguments, **keywords)
        return {name: total * (1 + 1e-4) for name, total in sums.items()}, norms

    monkeypatch.setattr(dpfa_training.engine, "clipped_sums", wrong)
    monkeypatch.setattr(runner, "interleaved", lambda *arguments, **keywords: pytest.fail("timed"))
    case = CASES["private_step"]
    with pytest.raises(GateFailed, match="nothing was measured"):
        runner.run(case, case.toy, repeats=1, command="a test")


def test_the_command_line_writes_nothing_when_the_gate_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*arguments: object, **keywords: object) -> None:
        raise GateFailed("no")

    monkeypatch.setattr(runner, "run", refused)
    path = tmp_path / "records.jsonl"
    assert __main__.main(["run", "private_step", "--record", str(path)]) == 1
    assert not path.exists()


def test_a_peer_that_fails_is_listed_with_its_reason() -> None:
    def broken() -> float:
        raise RuntimeError("no such layer")

    peer = Contender(name="peer", what="", build=lambda: lambda: None, private=True, error=broken)
    assert "no such layer" in runner._checked(CASES["private_step"], peer, {}).unavailable


def test_contenders_take_turns() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "AB"}
    seconds = interleaved(steps, warmups=1, repeats=2, advance=lambda: None)
    assert order == list("AB" * 3)
    assert {name: len(times) for name, times in seconds.items()} == {"A": 2, "B": 2}


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="speed"):
        runner.with_changes(CASES["private_step"], {"speed": 9})
    assert __main__.main(["run", "private_step", "--set", "speed=9"]) == 2
    assert __main__.main(["run", "no_such_case"]) == 2


def test_a_run_from_the_command_line_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "peak_memory", lambda *arguments: 7)
    path = tmp_path / "records.jsonl"
    arguments = ["run", "private_step", "--repeats", "1", "--set", "batch=4", "--set", "one_by_one=false"]
    assert __main__.main([*arguments, "--record", str(path), "--json"]) == 0
    (record,) = read(path)
    assert Record.from_json(json.loads(capsys.readouterr().out)) == record
    assert record.parameters["batch"] == 4
    assert record.command.endswith(f"--record {path} --json")
    assert record.result("one_by_one").unavailable
    assert record.result("dpfa").peak_memory_bytes == 7


def test_peak_memory_is_that_of_the_step_in_a_process_of_its_own() -> None:
    case = CASES["release_call"]
    small, large = (
        peak_memory(case.name, "plain", runner.with_changes(case, {"batch": n, "heads": 1, "length": 1024}), 1)
        for n in (1, 96)
    )
    output = 4 * 96 * 1024 * 64  # 24 MiB: far above what pages of code, loaded late, add to any step
    assert small < output / 2
    assert output <= large < 8 * output
