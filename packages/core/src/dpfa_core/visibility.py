"""Which keys a query row sees: the one definition that sensitivities, kernels and tests share."""

from __future__ import annotations

from dpfa_core.checks import require
from dpfa_core.spec import AttentionProblem


def lengths(problem: AttentionProblem, batch_row: int = 0) -> tuple[int, int]:
    """(queries, keys) of one batch row."""
    return problem.lengths[batch_row] if problem.lengths else (problem.q_len, problem.kv_len)


def visible_range(problem: AttentionProblem, row: int, batch_row: int = 0) -> tuple[int, int]:
    """Half-open range of the keys that query `row` sees under causal, window and lengths.

    Causal masks and windows are aligned bottom-right: the last query row stands at the last key.
    An empty range is ``(start, start)``; a padding row, past its length, sees nothing.
    A problem with a packed `mask` has no ranges and is refused.
    """
    require(problem.mask is None, "a problem with a packed mask has no visible range", "mask")
    q_len, kv_len = lengths(problem, batch_row)
    if row >= q_len:
        return 0, 0
    diagonal = row + kv_len - q_len
    left, right = problem.window
    if problem.causal:
        right = 0 if right < 0 else min(right, 0)
    start = 0 if left < 0 else max(0, diagonal - left)
    stop = kv_len if right < 0 else min(kv_len, diagonal + right + 1)
    start = min(start, kv_len)
    return start, max(start, stop)


def rows_that_see(problem: AttentionProblem, batch_row: int = 0) -> int:
    """How many query rows see a key under causal, window and lengths, without looking at each of them.

    Only rows too far ahead of the first key see none: a range ends before it, and never begins after the last key.

    Guarantee: tested (equal to counting ``visible_range``).
    Raises: PrivacyParameterError for a problem with a packed `mask`.
    """
    require(problem.mask is None, "a problem with a packed mask has no visible range", "mask")
    q_len, kv_len = lengths(problem, batch_row)
    right = problem.window[1]
    if problem.causal:
        right = 0 if right < 0 else min(right, 0)
    return 0 if kv_len == 0 else q_len if right < 0 else min(q_len, kv_len + right)
