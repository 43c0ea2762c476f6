"""``dpfa train`` as a user meets it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from dpfa_core.errors import LedgerError
from dpfa_core.ledger import Ledger

KEYS = {
    "epsilon",
    "delta",
    "epsilons",
    "unit",
    "relation",
    "steps",
    "sampling_probability",
    "noise_multiplier",
    "max_grad_norm",
    "events",
    "not_covered",
}
MORE = {
    "test_accuracy",
    "test_accuracy_interval",
    "baseline_nonprivate",
    "baseline_majority",
    "seconds",
    "run",
}


def test_a_run_leaves_weights_statement_metrics_and_report(dpfa, csv, tmp_path):
    out = tmp_path / "run"
    done = dpfa("train", "--data", csv(), "--epsilon", 8, "--delta", 1e-3, "--epochs", 3, "--out", out, "--json")
    assert done.code == 0, done.err
    result, privacy = done.json, json.loads((out / "privacy.json").read_text())
    assert result.keys() >= KEYS | MORE
    assert privacy.keys() >= KEYS
    assert 7.5 < privacy["epsilon"] <= 8
    assert set(privacy["epsilons"]) == {"rdp", "pld", "prv"}
    assert privacy["epsilon"] == min(privacy["epsilons"].values())
    assert (privacy["unit"], privacy["relation"]) == ("example", "add_or_remove")
    assert privacy["randomness"] == "ChaCha20, key from the operating system"
    [line] = privacy["events"]
    assert line["count"] == privacy["steps"] == result["steps"]
    assert line["event"]["event"] == "PoissonSampled"
    with Ledger.read(out / "ledger.db") as ledger:
        assert ledger.spent() == privacy["epsilon"]
    weights = out / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == privacy["weights_sha256"]
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["dp"])["epsilon"] == privacy["epsilon"]
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "What is not covered" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "ledger.db",
        "metrics.json",
        "model.safetensors",
        "privacy.json",
        "report.html",
    ]


def test_text_ends_15_points_above_the_majority_at_epsilon_8_beside_its_baseline(dpfa, csv, tmp_path):
    out = tmp_path / "run"
    done = dpfa("train", "--data", csv(2000), "--epsilon", 8, "--out", out, "--seed", 1, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert result["test_accuracy"] >= result["baseline_majority"] + 0.15
    assert 0 < result["baselines"]["private bag of words"] <= 1
    assert "NOT SECURE" in result["randomness"]


def test_table_for_people_names_epsilon_baselines_and_the_folder(dpfa, csv, tmp_path):
    out = tmp_path / "run"
    done = dpfa("train", "--data", csv(), "--epochs", 1, "--delta", 0.01, "--out", out)
    assert done.code == 0, done.err
    for text in ("test accuracy", "95 % interval", "not private", "majority class", "private bag of words", "by PLD"):
        assert text in done.out
    assert "delta = 0.01 is not below 1 /" in done.err  # a warning, not an error


def bad(dpfa, *arguments):
    done = dpfa("train", *arguments)
    assert done.code == 2, done
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1, done.err
    return done.err


def test_missing_file(dpfa, tmp_path):
    assert "there is no file" in bad(dpfa, "--data", tmp_path / "none.csv")


def test_wrong_column_lists_the_columns(dpfa, csv):
    assert "its columns are text, label" in bad(dpfa, "--data", csv(), "--text-column", "review")


def test_one_class_only(dpfa, tmp_path):
    path = tmp_path / "one.csv"
    path.write_text("text,label\n" + "".join(f"a fine day number {day},good\n" for day in range(50)))
    assert "two classes" in bad(dpfa, "--data", path)


def test_empty_text(dpfa, csv):
    path = csv()
    path.write_text(path.read_text() + ",good\n")
    assert "1 of 301 are empty" in bad(dpfa, "--data", path)


def test_nan_in_an_image(dpfa, tmp_path):
    import numpy as np
    from PIL import Image

    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(30):
            pixels = np.full((8, 8), 0.5, dtype=np.float32)
            if (name, index) == ("dogs", 3):
                pixels[0, 0] = math.nan
            Image.fromarray(pixels, mode="F").save(tmp_path / "pets" / name / f"{index}.tiff")
    assert "NaN" in bad(dpfa, "--data", tmp_path / "pets")


@pytest.mark.parametrize("value", [0, -1, "inf", "nan"])
def test_epsilon_must_be_a_positive_number(dpfa, value):
    assert "--epsilon must be a finite number > 0" in bad(dpfa, "--epsilon", value)


@pytest.mark.parametrize("value", [0, 1.5])
def test_delta_must_be_a_probability(dpfa, value):
    assert "--delta must be in (0, 1)" in bad(dpfa, "--delta", value)


def test_batch_larger_than_the_data(dpfa, csv):
    assert "--batch-size must not exceed" in bad(dpfa, "--data", csv(), "--batch-size", 5000)


def test_folder_that_cannot_be_written(dpfa, csv, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out must be a folder that can be written" in bad(
        dpfa, "--data", csv(), "--epochs", 1, "--out", tmp_path / "file" / "run"
    )


def test_folder_with_files_is_not_overwritten(dpfa, csv, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "new or empty folder" in bad(dpfa, "--data", csv(), "--epochs", 1, "--out", tmp_path / "full")


def test_model_directory_that_is_none(dpfa, csv, tmp_path):
    assert "Hugging Face" in bad(dpfa, "--data", csv(), "--model", tmp_path / "none")


def test_resume_of_nothing(dpfa, tmp_path):
    assert "--resume needs the folder of an interrupted run" in bad(dpfa, "--resume", tmp_path)


def test_unknown_option_is_bad_input(dpfa):
    assert dpfa("train", "--epsilom", 3).code == 2


def test_a_broken_plugin_installed_does_not_stop_the_run(dpfa, csv, tmp_path, monkeypatch):
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dp_flash_attention.accountants]\nwild = no_such_module:Wild\n"
        "[dp_flash_attention.backends]\nwild = no_such_module:Wild\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    from dpfa_core.registry import ACCOUNTANTS, BACKENDS

    for registry in (ACCOUNTANTS, BACKENDS):
        registry.refresh()
    try:
        done = dpfa("train", "--data", csv(), "--epochs", 1, "--out", tmp_path / "run", "--json")
        assert done.code == 0, done.err
        assert "wild" not in done.json["epsilons"]
        doctor = dpfa("doctor")
        assert doctor.code == 1
        assert "failed to load" in doctor.out
    finally:
        monkeypatch.undo()
        for registry in (ACCOUNTANTS, BACKENDS):
            registry.refresh()


def test_interrupt_keeps_what_was_spent_and_resume_goes_on(csv, tmp_path, dpfa):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dp_flash_attention", "train", "--data", str(csv(600)), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--epochs", "400", "--seed", "5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while steps_recorded(out) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "What was spent is in the ledger" in err
    spent = steps_recorded(out)
    assert spent >= 3
    assert (out / "checkpoint.pt").is_file()
    assert not (out / "privacy.json").exists()
    shorten(out, spent + 2)
    done = dpfa("train", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert done.json["steps"] == spent + 2
    assert done.json["epsilon"] <= 3
    assert "finished" in bad(dpfa, "--resume", out)


def steps_recorded(out: Path) -> int:
    try:
        with Ledger.read(out / "ledger.db") as ledger:
            return sum(count for _, count in ledger.events())
    except LedgerError:  # not there yet
        return 0


def shorten(out: Path, steps: int) -> None:
    """Plan fewer steps, so that the test need not wait for the rest."""
    plan = json.loads((out / "resume.json").read_text())
    (out / "resume.json").write_text(json.dumps(plan | {"steps": steps}))


def test_resume_on_other_data_is_refused(dpfa, csv, tmp_path):
    out = tmp_path / "run"
    path = csv(300)
    done = dpfa("train", "--data", path, "--epochs", 1, "--out", out, "--json")
    assert done.code == 0, done.err
    for name in ("privacy.json",):
        (out / name).unlink()
    settings = json.loads((out / "metrics.json").read_text())["settings"]
    plan = {"settings": settings, "plan": {}, "steps": 1, "digest_key": "00" * 32, "digest": "other"}
    (out / "resume.json").write_text(json.dumps(plan))
    assert "other records" in bad(dpfa, "--resume", out)


def test_a_ledger_that_was_spent_elsewhere_exhausts_the_budget(dpfa, csv, tmp_path):
    from dp_flash_attention.data.sources import load_task
    from dp_flash_attention.training_run.settings import Settings
    from dpfa_core.events import Gaussian
    from dpfa_training import plan_for_target

    path, out = csv(300), tmp_path / "run"
    out.mkdir()
    settings = Settings(data=str(path))
    task = load_task(str(path))
    plan = plan_for_target(
        target_epsilon=3.0,
        target_delta=1e-5,
        steps=4,
        max_grad_norm=1.0,
        population=len(task.train),
        expected_batch_size=60,
    )
    key = os.urandom(32)
    stored = {
        "settings": settings.to_json(),
        "plan": plan.to_json(),
        "steps": 4,
        "digest_key": key.hex(),
        "digest": task.digest(key),
    }
    (out / "resume.json").write_text(json.dumps(stored))
    with Ledger.open(out / "ledger.db", unit="example", relation="add_or_remove", delta=1e-5, budget=3.0) as ledger:
        ledger.record(Gaussian(2.5), purpose="another analysis", mechanism="gaussian", backend="torch")
    done = dpfa("train", "--resume", out)
    assert done.code == 3
    assert "would exceed it" in done.err
