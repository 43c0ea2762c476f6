"""``dpfa doctor``, ``verify``, ``report``, and in passing ``plan release`` and ``spent``."""

from __future__ import annotations

import json

import pytest

from dpfa_core.events import Gaussian
from dpfa_core.ledger import Ledger


def test_plan_release_shows_what_sensitivity_analysis_buys(dpfa):
    done = dpfa(
        *("plan", "release", "--epsilon", 1, "--delta", 1e-6, "--q-len", 32, "--unit", "token"),
        *("--queries", "public", "--logit-bound", 0.5, "--json"),
    )
    assert done.code == 0, done.err
    assert done.json["sensitivity"] == pytest.approx(0.912, abs=2e-3)
    assert done.json["sensitivity_naive"] == pytest.approx(11.31, abs=0.01)
    assert done.json["noise_scale"] > done.json["sensitivity"] * done.json["noise_multiplier"]
    missing = dpfa("plan", "release", "--epsilon", 1, "--delta", 1e-6, "--q-len", 32, "--unit", "token")
    assert missing.code == 2
    assert 'needs queries="public" or "private"' in missing.err


def test_plan_release_with_an_unknown_mechanism_names_those_installed(dpfa):
    done = dpfa("plan", "release", "--epsilon", 1, "--delta", 1e-6, "--q-len", 8, "--mechanism", "gausian")
    assert done.code == 2
    installed = done.err.partition("installed: ")[2]
    assert "gaussian, " in installed
    assert "laplace" in installed


def test_spent_adds_up_a_ledger(dpfa, tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(path, unit="sequence", relation="replace", delta=1e-5) as ledger:
        ledger.record(Gaussian(2.0), purpose="test", mechanism="gaussian", backend="torch", count=4)
    done = dpfa("spent", path, "--json")
    assert done.code == 0, done.err
    assert done.json["epsilon"] == pytest.approx(4.3771781, rel=1e-5)
    assert done.json["events"] == [{"event": {"event": "Gaussian", "noise_multiplier": 2.0}, "count": 4}]
    assert "epsilon = 4.378 at delta = 1e-05" in dpfa("spent", path).out
    assert dpfa("spent", tmp_path / "none.db").code == 2
    assert dpfa("spent", path, "--delta", 2).code == 2


def test_doctor_says_which_backend_is_not_installed(dpfa):
    done = dpfa("doctor", "--json")
    assert done.code == 0, done.out
    texts = " ".join(finding["text"] for finding in done.json["findings"])
    assert "not installed: pip install dpfa-kernels-triton" in texts


def test_report_is_drawn_again_from_its_files(dpfa, csv, tmp_path):
    out = tmp_path / "run"
    assert dpfa("train", "--data", csv(), "--epochs", 1, "--out", out).code == 0
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    done = dpfa("report", out)
    assert done.code == 0
    assert done.out.strip() == str(out / "report.html")
    assert len((out / "report.html").read_text()) == pytest.approx(len(before), rel=0.05)
    (out / "privacy.json").write_text("{")
    broken = dpfa("report", out)
    assert broken.code == 2
    assert "readable privacy.json" in broken.err


def test_verify_checks_one_plugin_and_fails_for_an_unknown_name(dpfa):
    pytest.importorskip("dpfa_verification", reason="dpfa-verification is not installed")
    done = dpfa("verify", "gaussian", "--quick", "--json")
    assert done.code == 0, done.err
    assert done.json["ok"]
    assert json.dumps(done.json)
    assert dpfa("verify", "no-such-plugin").code == 2


@pytest.mark.parametrize("command", ["train", "plan train", "plan release", "report", "spent", "doctor", "verify"])
def test_every_command_has_help_with_an_example(dpfa, command):
    done = dpfa(*command.split(), "--help")
    assert done.code == 0
    assert "dpfa " in done.out
    assert "xample" in done.out or command in ("report",)
