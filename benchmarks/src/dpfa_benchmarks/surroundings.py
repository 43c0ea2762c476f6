"""Where a measurement was made: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from dpfa_benchmarks import __version__

OURS = (
    "dp-flash-attention",
    "dpfa-accounting",
    "dpfa-attention",
    "dpfa-core",
    "dpfa-kernels-cpu",
    "dpfa-kernels-torch",
    "dpfa-mechanisms",
    "dpfa-training",
)


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, operating system, how busy it was, and how waiting threads wait."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_1min": load,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }


def versions(peers: tuple[str, ...]) -> dict[str, str]:
    """Python, torch, our packages and the peers; "not installed" where they are not."""
    found = {"python": platform.python_version(), "dpfa-benchmarks": __version__}
    for name in ("torch", *OURS, *peers):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout this runs from; None without one."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None, None
    # Records are written by the runs themselves: a new line there does not make the code dirty.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)*.jsonl")
    return head, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        root = Path(__file__).resolve().parent
        done = subprocess.run(  # fixed arguments, no shell
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
