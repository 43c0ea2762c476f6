"""Memory grows with the length, not with its square: no matrix of all queries and keys exists, there and back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from dpfa_attention import dp_flash_attn_func

length, window = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def released(length, window):
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, length, 8, 64, generator=generator).requires_grad_() for _ in range(3)]
    dp_flash_attn_func(*qkv, epsilon=8.0, delta=1e-6, window_size=(window, 0 if window >= 0 else -1)).sum().backward()

released(64, -1)
before = peak()
released(length, window)
print(before, peak())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource usage is asked of a POSIX system")
@pytest.mark.parametrize(
    ("length", "window", "limit"),
    [
        # one float32 matrix of 8 heads, 2048 queries and 2048 keys would have 128 MiB
        (2048, -1, 100 * 2**20),
        # all that grows with the length alone, at a length where one such matrix would have 2 GiB
        (8192, 32, 500 * 2**20),
    ],
)
def test_a_release_and_its_gradient_take_memory_that_is_linear_in_the_length(
    length: int, window: int, limit: int
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(length), str(window)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    before, peak = (int(number) for number in ran.stdout.split())
    assert peak - before < limit
