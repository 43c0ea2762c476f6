"""``python -m dpfa_verification`` and the text of a report."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from dpfa_core.spec import Claim
from dpfa_verification.__main__ import main
from dpfa_verification.conformance import Report, render


def test_0_when_every_obligation_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laplace", "--quick"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: mechanism laplace, dpfa-mechanisms 0.1.0 (dpfa_mechanisms.laplace:Laplace)\n")
    assert "  tested   calibration " in out


def test_1_when_one_fails_and_json_is_one_object(
    distribution: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    distribution("acme-crash", "mechanisms", {"crash": "acme_crash_too:Thing"}, {"acme_crash_too": "1 / 0\n"})
    assert main(["crash", "laplace", "--quick", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert [(report["name"], report["ok"]) for report in answer["reports"]] == [("crash", False), ("laplace", True)]
    (finding,) = answer["reports"][0]["obligations"]
    assert finding["claim"]["obligation"] == "load"
    assert "ZeroDivisionError" in finding["counterexample"]


def test_2_for_an_unknown_name_or_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nobody"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "got nobody; install the package that provides it or correct the name." in captured.err
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--full"])


def test_a_report_shows_the_counterexample_below_its_obligation() -> None:
    findings = ((Claim("first", source="a book"), "tested", ""), (Claim("second"), "failed", "here\nand there"))
    report = Report(False, findings, "x", "backend", "acme 1.0 (x:y)")
    assert render(report) == (
        "FAILED: backend x, acme 1.0 (x:y)\n"
        "  tested   first                      a book\n"
        "  FAILED   second\n"
        "           here\n"
        "           and there"
    )
