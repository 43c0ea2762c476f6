from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dpfa_attention.noise_keys import release_key

CPU = torch.device("cpu")

TWO_CALLS = """
import torch
from dpfa_attention import dp_flash_attn_func
torch.set_num_threads(1)
x = torch.linspace(-1, 1, 64).reshape(1, 4, 2, 8)
outs = [dp_flash_attn_func(x, x, x, epsilon=1.0, delta=1e-5, seed=31337).numpy().tobytes().hex() for _ in range(2)]
"""


def test_a_seed_repeats_in_every_process_and_never_inside_one() -> None:
    here: dict[str, Any] = {}
    exec(TWO_CALLS, here)  # noqa: S102
    script = TWO_CALLS + "print(*outs)"
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert here["outs"] == there
    assert there[0] != there[1]


def test_without_a_seed_keys_are_secret_and_numbers_never_repeat() -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: release_key(None, CPU), range(200)))
    assert all(key.secure and key.generator == "chacha20" for key in keys)
    assert len({int(key.release) for key in keys}) == 200


def test_a_seed_is_marked_not_secure_and_counts_on() -> None:
    first, second, other = (release_key(seed, CPU) for seed in (424242, 424242, 424243))
    assert not first.secure
    assert torch.equal(first.words, second.words)
    assert (int(first.release), int(second.release), int(other.release)) == (0, 1, 0)
    assert not torch.equal(first.words, other.words)
