"""The truths that plans and picks are held to: attained, summed another way, or known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Structure
from dpfa_verification.truth import grids, moves, profiles, selections
from dpfa_verification.truth.neighbours import farthest

SHAPE: dict[str, Any] = {"batch": 1, "q_len": 5, "kv_len": 5, "q_heads": 2, "kv_heads": 1, "head_dim": 8}


def plan(**more: Any) -> NoisePlan:
    return NoisePlan(**({"mechanism": "given", "distribution": "gaussian", "head_scale": (0.5,)} | more))


@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_even_moves_are_those_of_the_farthest_neighbours(queries: Any, causal: bool, power: int) -> None:
    for shape in (SHAPE, SHAPE | {"q_len": 3}):
        problem = AttentionProblem(**shape, clip_norm=1.5, logit_bound=1.0, causal=causal)
        spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries)
        reached = farthest(spec, problem, "l1" if power == 1 else "l2")
        assert moves.spent(spec, problem, plan(), power) == pytest.approx((reached / 0.5) ** power)


def test_uneven_noise_is_counted_row_by_row() -> None:
    """Causal, public queries: key 0 is seen by all rows, and each row has its own scale."""
    problem = AttentionProblem(**SHAPE, clip_norm=1.0, logit_bound=1.0, causal=True)
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="public")
    rows = (9.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    expected = sum((2.0 / (1.0 + (n - 1) * math.exp(-2.0)) / n) ** 2 for n in range(1, 6))
    heads = 0.5**-2 + 0.25**-2
    found = moves.spent(spec, problem, plan(head_scale=(0.5, 0.25), row_scale=rows), 2)
    assert found == pytest.approx(expected * heads)
    assert moves.spent(spec, problem, plan(row_scale=(1.0, 0.0, 1.0, 1.0, 1.0, 1.0)), 2) == math.inf
    assert moves.spent(spec, problem, plan(row_scale=(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)), 2) < math.inf


def test_masks_and_lengths_hide_keys() -> None:
    bits = np.zeros((5, 5), dtype=bool)
    bits[:, 1] = bits[4, 4] = True
    masked = AttentionProblem(**SHAPE, mask=np.packbits(bits).tobytes(), causal=True)
    assert moves.sees(masked, 0).sum(axis=1).tolist() == [0, 1, 1, 1, 2]
    short = AttentionProblem(**SHAPE | {"batch": 2}, lengths=((5, 5), (2, 4)), causal=True, window=(1, 0))
    assert moves.sees(short, 1).tolist() == [[False, True, True, False], [False, False, True, True]]


def test_a_structure_may_stretch_what_a_record_moves() -> None:
    sparse = {"sparsity": 0.75, "kept": 2.0, "rescale": 1.0}
    blocks = {"block_size": 4.0, "condition": 9.0}

    def of(kind: Any, parameters: dict[str, float], norm: Any = "l2") -> float:
        structure = Structure(kind=kind, parameters=tuple(parameters.items()), seed=0)
        return moves.stretch(plan(structure=structure, norm=norm))

    assert of("sparse", sparse) == 4.0
    assert of("sparse", sparse | {"rescale": 0.0}) == of("low_rank", {"rank": 2.0}) == 1.0
    assert of("block_diagonal", blocks) == 3.0
    assert of("block_diagonal", blocks, "whitened_l2") == 1.0


@pytest.mark.parametrize(("steps", "scale"), [(1, 0.5), (3, 2.0), (10, 8.0)])
def test_the_cost_on_a_grid_is_the_sum_over_all_events(steps: int, scale: float) -> None:
    k = range(-150, 151)
    whole = math.fsum(math.exp(-(i**2) / (2 * scale**2)) for i in k)
    for epsilon in (0.1, 1.0, 3.0):
        expected = math.fsum(
            max(
                0.0,
                math.exp(-((i - steps) ** 2) / (2 * scale**2)) - math.exp(epsilon) * math.exp(-(i**2) / (2 * scale**2)),
            )
            for i in k
        )
        assert grids.discrete_gaussian(epsilon, steps, scale) == pytest.approx(expected / whole, rel=1e-9, abs=1e-40)
    assert grids.divergence(2.0, steps, scale) == pytest.approx((steps / scale) ** 2, rel=1e-9)


def test_a_fine_grid_costs_what_the_reals_cost() -> None:
    found = grids.discrete_gaussian(1.0, 1000, 1000.0)
    assert found == pytest.approx(float(profiles.gaussian(1.0, 1.0)), rel=1e-3)


def test_picks_are_held_to_the_law() -> None:
    law = selections.exponential((0.0, 2.0, 4.0), 1.0, 1.0)
    assert law == pytest.approx(np.array([1.0, math.e, math.e**2]) / (1.0 + math.e + math.e**2))
    counts = np.random.default_rng(0).multinomial(20_000, law)
    assert selections.agrees(counts, law)
    assert not selections.agrees(np.random.default_rng(0).multinomial(20_000, np.array([0.1, 0.3, 0.6])), law)
    assert selections.agrees(np.array([1000, 0]), np.array([1.0, 1e-9]))
    assert not selections.agrees(np.array([900, 100]), np.array([1.0, 1e-9]))


def test_neighbours_counts_are_held_to_their_ratio() -> None:
    draw = np.random.default_rng(1).multinomial
    at_the_limit, far = np.array([math.e, 9.0]) / (math.e + 9.0), np.array([0.6, 0.4])
    base = np.array([1.0, 9.0 + math.e - 1.0]) / (9.0 + math.e)
    assert selections.excess(draw(20_000, at_the_limit), draw(20_000, base), 1.0)[0] < 4.9
    found, candidate = selections.excess(draw(20_000, far), draw(20_000, base), 1.0)
    assert (found > 4.9, candidate) == (True, 0)
