"""``python -m dpfa_benchmarks.utility``: what the main job reaches, as the mean over several seeds.

Each seed draws its own split, sampling and noise. The record is one JSON line with every run's result.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import track

from dpfa_benchmarks import surroundings
from dpfa_benchmarks.plot import MAIN_JOB
from dpfa_benchmarks.record import append_line, line_of

KEPT = (
    "test_accuracy",
    "baseline_nonprivate",
    "baseline_majority",
    "baselines",
    "epsilon",
    "epsilons",
    "delta",
    "steps",
    "noise_multiplier",
    "seconds",
)


def main(arguments: list[str]) -> int:
    """Run ``dpfa train`` for each seed; print the record, and append it where ``--record`` says."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks.utility", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, 2 ...")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to this file")
    parser.add_argument("train", nargs="*", help="options of dpfa train, after --")
    options = parser.parse_args(arguments)
    machine = surroundings.machine()
    runs = [train(seed, options.train) for seed in track(range(options.seeds), description="seeds")]
    commit, dirty = surroundings.commit()
    accuracies = [run["test_accuracy"] for run in runs]
    record = {
        "what": MAIN_JOB,
        "command": shlex.join(["python", "-m", "dpfa_benchmarks.utility", *arguments]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine,
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice"),
        "versions": surroundings.versions(()),
        "mean": statistics.mean(accuracies),
        "standard_error": statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(runs) > 1 else None,
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "runs": runs,
    }
    line = line_of(record)
    sys.stdout.write(line)
    if options.record:
        append_line(options.record, line)
    return 0


def train(seed: int, options: list[str]) -> dict[str, Any]:
    """One whole ``dpfa train`` in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dp_flash_attention", "train", "--json", f"--seed={seed}"]
        command += [f"--out={folder}/run", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"dpfa train must end well for seed {seed}, got exit code {done.returncode}: {done.stderr}")
    result = json.loads(done.stdout)
    return {"seed": seed} | {key: result[key] for key in KEPT}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
