"""The gate comes before the clock, contenders take turns, and a case runs at toy size."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpfa_benchmarks import __main__, runner
from dpfa_benchmarks.case import Contender, GateFailed, Skipped
from dpfa_benchmarks.cases import CASES, fastdp_step, one_by_one, private_step
from dpfa_benchmarks.cases.for_peers import by_our_names, with_tables
from dpfa_benchmarks.memory import peak_memory
from dpfa_benchmarks.record import Record, read
from dpfa_benchmarks.timing import interleaved
from dpfa_benchmarks.workloads import MODELS, tiny_bert


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


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_model_passes_the_gate_whole_and_in_parts(model: str) -> None:
    case = CASES["private_step"]
    changes = {"model": model, "batch": 5, "toy": True, "physical_batch": [0, 2]}  # 2 + 2 + 1, the 1 with padding
    try:
        contenders = case.contenders(runner.with_changes(case, changes))
    except Skipped as reason:
        pytest.skip(str(reason))
    errors = {c.name: c.error() for c in contenders if c.ours or c.name == "one_by_one" if c.error}
    assert set(errors) == {"dpfa", "dpfa_rows_2", "one_by_one"}
    assert max(errors.values()) <= case.tolerance, errors


def test_a_part_of_ours_that_is_wrong_is_refused_too() -> None:
    case = CASES["private_step"]
    contenders = case.contenders(runner.with_changes(case, {**case.toy, "physical_batch": [0, 4]}))
    with pytest.raises(GateFailed, match="dpfa_rows_4"):
        runner.gate(case, {"dpfa": 1e-7, "dpfa_rows_4": 1e-4}, contenders)


def test_a_model_has_the_same_weights_and_rows_at_every_call() -> None:
    one, two = (MODELS["gpt_tied"].build(3, True) for _ in range(2))
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.labels[:, :-1], one.inputs[:, 1:])
    assert torch.equal(one.loss(one.model()), two.loss(two.model()))


@pytest.mark.parametrize("model", ["gpt", "vit197", "tiny_bert"])
def test_what_peers_get_is_the_same_function(model: str) -> None:
    try:
        work = MODELS[model].build(3, True)
    except Skipped as reason:
        pytest.skip(str(reason))
    plain, theirs = work.model(), with_tables(work.model())
    for module in (plain, theirs):
        work.loss(module).backward()
    exact = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = by_our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert not any(p.dim() == 3 for p in theirs.parameters())
    assert one_by_one.relative_error(found, exact) < 1e-6


def test_a_missing_library_skips_a_model_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny_bert, "find_spec", lambda name: None)
    assert __main__.main(["run", "private_step", "--set", "model=tiny_bert"]) == 0
    assert "needs transformers" in capsys.readouterr().err


def test_a_peer_without_a_checkout_is_listed_with_its_reason(tmp_path: Path) -> None:
    assert "--peer-path" in fastdp_step.unavailable("")
    assert "no folder fastDP" in fastdp_step.unavailable(str(tmp_path))


FAKE = """
class PrivacyEngine:
    def __init__(self, module, **settings):
        self.module = module

    def attach(self, optimizer):
        for parameter in self.module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "private_grad", p.grad))
"""


@pytest.mark.parametrize("wanted", ["--peer-path", "--set peer_path"])
def test_a_checkout_of_a_peer_is_timed_and_compared(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fastDP").mkdir()
    (tmp_path / "fastDP" / "__init__.py").write_text(FAKE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "fastDP", raising=False)
    monkeypatch.setattr(runner, "peak_memory", lambda *arguments: 1)
    given = ["--peer-path", str(tmp_path)] if wanted == "--peer-path" else ["--set", f"peer_path={tmp_path}"]
    options = ["--toy", "--json", "--repeats", "1", "--set", "model=gpt", "--set", "one_by_one=false", *given]
    assert __main__.main(["run", "private_step", *options]) == 0
    sys.modules.pop("fastDP")
    peer = next(one for one in json.loads(capsys.readouterr().out)["results"] if one["name"] == "fastdp")
    assert peer["seconds"]["p50"] > 0
    assert peer["error"] > 0.01  # it does not clip, and is shown beside its error
    assert __main__.main(["run", "release_call", "--peer-path", str(tmp_path)]) == 2


def test_training_runs_every_model_and_its_record_names_the_command_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[dict[str, Any], str]] = []

    def noted(case: Any, changes: dict[str, Any], *, command: str, **rest: Any) -> None:
        asked.append((changes, command))
        raise GateFailed("no")

    monkeypatch.setattr(runner, "run", noted)
    assert __main__.main(["training", "--repeats", "2", "--set", "batch=4", "--peer-path", "there"]) == 1
    assert [changes for changes, _ in asked] == [{"peer_path": "there", "model": model, "batch": 4} for model in MODELS]
    assert all(f"run private_step --set model={changes['model']} " in command for changes, command in asked)


def test_a_wrong_gradient_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = private_step.make_private

    def wrong(*, max_grad_norm: float, **keywords: Any) -> Any:
        return right(max_grad_norm=max_grad_norm * (1 + 1e-4), **keywords)

    monkeypatch.setattr(private_step, "make_private", wrong)
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

    peer = Contender(name="peer", what="", build=lambda: broken, private=True, error=broken)
    case = CASES["private_step"]
    assert "no such layer" in runner._checked(case, peer, {}).unavailable
    assert "no such layer" in runner._built(case, peer, {}).unavailable
    with pytest.raises(RuntimeError):
        runner._built(case, replace(peer, ours=True), {})


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
