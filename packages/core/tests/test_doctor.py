"""The examination: exit codes, JSON, and that a broken plugin is a finding rather than a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpfa_core
from dpfa_core.doctor import examine, main


def test_0_when_everything_found_works(plugins: Any, backend_source: Any, capsys: pytest.CaptureFixture[str]) -> None:
    modules = {"d_ok": backend_source("torch")}
    plugins.add("dpfa-kernels-torch", "backends", {"torch": "d_ok:Backend"}, modules, "0.1.0")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert "ok   backend torch: dpfa-kernels-torch 0.1.0 (d_ok:Backend)" in out
    assert "not installed: pip install dpfa-kernels-triton" in out


def test_1_and_the_cause_when_a_plugin_is_broken(plugins: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plugins.add("acme", "mechanisms", {"broken": "d_bad:Thing"}, {"d_bad": "import no_such_module\n"})
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    (finding,) = [found for found in report["findings"] if not found["ok"]]
    assert finding["subject"] == "mechanism broken"
    assert "No module named 'no_such_module'" in finding["text"]


@pytest.mark.parametrize("arguments", [[], ["heal"], ["doctor", "now"], ["--json"], ["doctor", "--verbose"]])
def test_2_for_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "usage: python -m dpfa_core doctor [--json]\n"


def test_a_probe_that_fails_is_a_finding(plugins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such machine")

    monkeypatch.setattr("dpfa_core.doctor._machine", broken)
    assert ("machine", False, "OSError: no such machine") in [(f.subject, f.ok, f.text) for f in examine()]


def test_an_environment_with_core_alone_is_healthy_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "dpfa_core").symlink_to(Path(dpfa_core.__file__).parent)
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "dpfa_core", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["ok"] is True
    texts = {finding["subject"]: finding["text"] for finding in report["findings"]}
    assert texts["selection"] == "no backend installed: pip install dpfa-kernels-torch"
    assert texts["torch"] == "not installed"
