"""What the mechanisms share on the way from a multiplier to a plan."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, Sensitivity, Structure
from dpfa_mechanisms.planning import block_spectrum, noise_plan

PROBLEM = AttentionProblem(batch=1, q_len=3, kv_len=3, q_heads=2, kv_heads=2, head_dim=8, clip_norm=1.0)
BOUND = Sensitivity(norm="l2", value=2.0, naive=2.0, item="P3.sequence")


@given(st.integers(1, 200), st.integers(1, 40), st.floats(1.0, 1e6))
def test_blocks_cover_all_columns_and_keep_their_condition(head_dim: int, block_size: int, condition: float) -> None:
    blocks = block_spectrum(head_dim, block_size, condition)
    assert sum(len(block) for block in blocks) == head_dim
    assert all(len(block) == block_size for block in blocks[:-1])
    for block in blocks:
        assert block[0] == 1.0
        if len(block) > 1:
            assert block[-1] == pytest.approx(1 / condition)
        for i in range(1, len(block) - 1):
            assert block[i] ** 2 == pytest.approx(block[i - 1] * block[i + 1])


@given(st.integers(2, 64), st.floats(1.5, 1e4))
def test_the_trace_of_a_block_has_a_closed_form(width: int, condition: float) -> None:
    ratio = condition ** (-1 / (width - 1))
    assert math.fsum(block_spectrum(width, width, condition)[0]) == pytest.approx((1 - ratio**width) / (1 - ratio))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 0, 2.0), "block_size must be an integer >= 1, got 0"),
        ((8, 2, 0.5), r"condition must be at least 1, got 0\.5"),
        ((8, 2, math.inf), "condition must be a finite number > 0, got inf"),
        ((0, 2, 2.0), "head_dim must be an integer >= 1, got 0"),
    ],
)
def test_blocks_that_cannot_be_are_refused(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        block_spectrum(*arguments)


def test_a_plan_carries_its_structure_rows_and_grid() -> None:
    structure = Structure(kind="low_rank", parameters=(("rank", 2.0),), seed=3)
    plan = noise_plan(
        "shaped", "gaussian", "l2", BOUND, (1.0,), PROBLEM, structure=structure, row_scale=(0.0, 1.0, 2.0, 3.0)
    )
    assert (plan.mechanism, plan.structure, plan.row_scale) == ("shaped", structure, (0.0, 1.0, 2.0, 3.0))
    on_grid = noise_plan("fine", "discrete_gaussian", "l2", BOUND, (1.0,), PROBLEM, grid=0.25)
    assert (on_grid.grid, on_grid.transform) == (0.25, "bm64")


def test_no_noise_at_all_is_no_plan() -> None:
    with pytest.raises(PrivacyParameterError, match="head_scale must be > 0 for at least one head"):
        noise_plan("open", "gaussian", "l2", BOUND, (0.0, 0.0), PROBLEM, noiseless_heads=True)
