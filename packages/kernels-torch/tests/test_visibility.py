from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_kernels_torch import visibility
from dpfa_kernels_torch.noise.release_noise import noise_scale

SHAPE: dict[str, Any] = {"batch": 2, "q_heads": 2, "kv_heads": 1, "head_dim": 4}


def masked(rows: int, keys: int, **fields: Any) -> tuple[AttentionProblem, torch.Tensor]:
    seen = np.random.default_rng(rows).random((rows, keys)) < 0.4
    mask = np.packbits(seen).tobytes()
    return AttentionProblem(**SHAPE, q_len=rows, kv_len=keys, mask=mask, **fields), torch.from_numpy(seen)


@pytest.mark.parametrize(("rows", "keys"), [(7, 9), (1, 1), (3, 8), (11, 13)])
def test_a_packed_mask_unpacks_from_any_row_to_any_row(rows: int, keys: int) -> None:
    problem, seen = masked(rows, keys)
    for first in range(rows):
        for last in range(first + 1, rows + 2):
            assert torch.equal(visibility.shown(problem, slice(first, last)), seen[first:last])


@pytest.mark.parametrize(
    "fields", [{}, {"causal": True}, {"window": (2, 1)}, {"lengths": ((7, 9), (4, 5))}], ids=lambda f: str(list(f))
)
def test_a_row_sees_what_its_range_and_the_mask_show(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    problem, seen = masked(7, 9, **fields)
    start, stop = visibility.key_ranges(problem)
    key = torch.arange(9)
    expected = (start[..., None] <= key) & (key < stop[..., None]) & seen
    assert expected.any()
    assert not expected.all()
    assert torch.equal(visibility.visible_keys(problem, slice(None), slice(0, 7), 0, 9), expected)
    assert torch.equal(visibility.visible_keys(problem, slice(1, 2), slice(2, 5), 3, 8), expected[-1:, 2:5, 3:8])
    monkeypatch.setattr(visibility, "ROWS_AT_ONCE", 3)
    visibility.visible_counts.cache_clear()
    assert torch.equal(visibility.visible_counts(problem), expected.sum(-1))


def test_rows_get_the_noise_of_the_keys_they_see() -> None:
    problem, seen = masked(7, 9, causal=True)
    scales = tuple(0.5 + n for n in range(10))
    plan = NoisePlan(mechanism="m", distribution="gaussian", head_scale=(1.0, 2.0), row_scale=scales)
    counts = (seen & (torch.arange(9) <= torch.arange(7)[:, None] + 2)).sum(-1)
    expected = (0.5 + counts.double())[:, None] * torch.tensor([1.0, 2.0])
    assert torch.equal(noise_scale(problem, plan), expected[None].double())
