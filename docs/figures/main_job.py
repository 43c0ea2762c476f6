"""The pictures of the README, from a finished run: ``python docs/figures/main_job.py runs/digits-...``."""

from __future__ import annotations

import sys
from pathlib import Path

from dp_flash_attention.training_run.report import accuracy_plot, spending_plot
from dp_flash_attention.training_run.run_folder import METRICS, PRIVACY, RunFolder

ASSETS = Path(__file__).parents[1] / "assets"

if __name__ == "__main__":
    folder = RunFolder(Path(sys.argv[1]))
    privacy, metrics = folder.read_json(PRIVACY), folder.read_json(METRICS)
    (ASSETS / "main-job-spending.svg").write_text(spending_plot(metrics["curve"], privacy), encoding="utf-8")
    (ASSETS / "main-job-accuracy.svg").write_text(accuracy_plot(metrics), encoding="utf-8")
