"""The range of visible keys against its definition, key by key."""

from __future__ import annotations

import itertools

import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem
from dpfa_core.visibility import lengths, rows_that_see, visible_range


def sees(row: int, key: int, q_len: int, kv_len: int, causal: bool, window: tuple[int, int]) -> bool:
    """flash-attn's rule: positions are counted from the bottom-right corner."""
    distance = key - (row + kv_len - q_len)
    left, right = window
    return (
        0 <= key < kv_len
        and not (causal and distance > 0)
        and not (left >= 0 and distance < -left)
        and not (right >= 0 and distance > right)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_range_holds_exactly_the_visible_keys(causal: bool) -> None:
    sides = (-1, 0, 1, 3)
    for q_len, kv_len in itertools.product(range(1, 6), repeat=2):
        for window in itertools.product(sides, repeat=2):
            problem = AttentionProblem(
                batch=1,
                q_len=q_len,
                kv_len=kv_len,
                q_heads=1,
                kv_heads=1,
                head_dim=1,
                causal=causal,
                window=window,
            )
            for row in range(q_len):
                start, stop = visible_range(problem, row)
                assert 0 <= start <= stop <= kv_len
                expected = [key for key in range(kv_len) if sees(row, key, q_len, kv_len, causal, window)]
                assert list(range(start, stop)) == expected
            ranges = [visible_range(problem, row) for row in range(q_len)]
            assert rows_that_see(problem) == sum(start < stop for start, stop in ranges)


def test_lengths_move_the_corner_of_each_batch_row() -> None:
    problem = AttentionProblem(
        batch=3,
        q_len=4,
        kv_len=6,
        q_heads=1,
        kv_heads=1,
        head_dim=1,
        causal=True,
        lengths=((4, 6), (2, 5), (3, 0)),
    )
    for batch_row in range(3):
        q_len, kv_len = lengths(problem, batch_row)
        for row in range(q_len):
            start, stop = visible_range(problem, row, batch_row)
            expected = [key for key in range(6) if sees(row, key, q_len, kv_len, True, (-1, -1))]
            assert list(range(start, stop)) == expected
    assert [rows_that_see(problem, batch_row) for batch_row in range(3)] == [4, 2, 0]


def test_a_packed_mask_has_no_range() -> None:
    problem = AttentionProblem(batch=1, q_len=2, kv_len=2, q_heads=1, kv_heads=1, head_dim=1, mask=b"\x0f")
    with pytest.raises(PrivacyParameterError, match="a packed mask has no visible range"):
        visible_range(problem, 0)
    with pytest.raises(PrivacyParameterError, match="a packed mask has no visible range"):
        rows_that_see(problem)


def test_padding_rows_see_nothing() -> None:
    problem = AttentionProblem(batch=1, q_len=4, kv_len=4, q_heads=1, kv_heads=1, head_dim=1, lengths=((2, 3),))
    assert [visible_range(problem, row) for row in range(4)] == [(0, 3), (0, 3), (0, 0), (0, 0)]
