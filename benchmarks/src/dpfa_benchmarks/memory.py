"""Peak memory of one contender, in a process of its own: ``python -m dpfa_benchmarks.memory``."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

STEPS = 3


def peak_memory(case: str, contender: str, parameters: Mapping[str, Any], threads: int) -> int:
    """Bytes above the baseline; see ``measure``.

    Raises: RuntimeError with what the process printed if it failed.
    """
    order = json.dumps({"case": case, "contender": contender, "parameters": dict(parameters), "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "dpfa_benchmarks.memory"], input=order, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {contender!r} failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def measure(case_name: str, contender_name: str, parameters: Mapping[str, Any], threads: int) -> int:
    """Peak resident memory over ``STEPS`` steps minus the resident memory right before them.

    Model, data and libraries are loaded before; what the optimiser and the engine allocate is counted.
    """
    import torch

    from dpfa_benchmarks.cases import CASES

    torch.set_num_threads(threads)
    (contender,) = [c for c in CASES[case_name].contenders(parameters) if c.name == contender_name]
    step = contender.build()
    _warm_up_torch()
    gc.collect()
    _forgetpeak()
    before = psutil.Process().memory_info().rss
    for _ in range(STEPS):
        step()
    return max(0, peak() - before)


def _warm_up_torch() -> None:
    # torch loads its matrix library and starts its threads with the first product: not a cost of the step.
    import torch

    x = torch.ones(8, 8, requires_grad=True)
    torch.nn.functional.gelu(torch.nn.functional.linear(x, x)).sum().backward()


def _forgetpeak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Largest resident size since ``_forget_peak``; without /proc, since the process began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    order = json.loads(sys.stdin.read())
    found = measure(order["case"], order["contender"], order["parameters"], order["threads"])
    sys.stdout.write(json.dumps({"peak_memory_bytes": found}) + "\n")
