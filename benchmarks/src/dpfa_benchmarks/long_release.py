"""One long release in a process of its own: its seconds, and all the memory that the process ever held."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LIMIT = 2 * 10**9
"""Bytes that a release of 16384 tokens, 8 heads of 64 columns, must stay below."""


def long_release(length: int, heads: int = 8, head_dim: int = 64, threads: int = 1) -> dict[str, Any]:
    """Measure one forward call in float32 on one batch row: seconds, peak_rss_bytes, backend.

    Raises: RuntimeError with what the process printed if it failed.
    """
    order = json.dumps({"length": length, "heads": heads, "head_dim": head_dim, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-m", "dpfa_benchmarks.long_release"], input=order, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the release of {length} tokens failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(order: Mapping[str, Any]) -> dict[str, Any]:
    import time

    import torch

    from dpfa_attention import dp_flash_attn_func
    from dpfa_benchmarks.memory import peak
    from dpfa_core.ledger import Ledger

    torch.set_num_threads(order["threads"])
    generator = torch.Generator().manual_seed(0)
    shape = (1, order["length"], order["heads"], order["head_dim"])
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    ledger = Ledger.memory()
    start = time.perf_counter()
    with torch.no_grad():
        dp_flash_attn_func(q, k, v, epsilon=8.0, delta=1e-5, clip_norm=1.0, ledger=ledger)
    seconds = time.perf_counter() - start
    (line,) = ledger.releases()
    return {**order, "seconds": seconds, "peak_rss_bytes": peak(), "backend": line.backend}


if __name__ == "__main__":
    found = measure(json.loads(sys.stdin.read()))
    sys.stdout.write(json.dumps(found) + "\n")
