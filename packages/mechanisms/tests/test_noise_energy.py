"""Energies against sampled or summed noise, and the promise of uneven plans against sums over single rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec, Structure
from dpfa_mechanisms.block_diagonal import BlockDiagonal
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.laplace import Laplace
from dpfa_mechanisms.low_rank import LowRank
from dpfa_mechanisms.noise_energy import draws, isotropic_energy, noise_energy, plan_multiplier, saving
from dpfa_mechanisms.sensitivity import row_bounds, sensitivity
from dpfa_mechanisms.sparse import Sparse

PROBLEM = AttentionProblem(
    batch=3,
    q_len=6,
    kv_len=6,
    q_heads=4,
    kv_heads=2,
    head_dim=10,
    lengths=((6, 6), (2, 5), (2, 5)),
    causal=True,
    clip_norm=1.5,
    logit_bound=0.5,
)
ROWS = 6 + 2 + 2
TOKEN = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="private")
SEQUENCE = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")


def plan(**more: Any) -> NoisePlan:
    return NoisePlan(**({"mechanism": "given", "distribution": "gaussian", "head_scale": (0.5,)} | more))


def structure(kind: str, **parameters: float) -> Structure:
    return Structure(kind=kind, parameters=tuple(parameters.items()), seed=1)  # type: ignore[arg-type]


LOW_RANK = structure("low_rank", rank=4)
SPARSE = structure("sparse", sparsity=0.7, kept=3, rescale=1)
BLOCKS = structure("block_diagonal", block_size=4, condition=9.0)


def test_energy_is_the_variance_of_every_released_number() -> None:
    assert noise_energy(plan(), PROBLEM) == pytest.approx(ROWS * 4 * 10 * 0.25)
    laplace = plan(distribution="laplace", norm="l1")
    draw = np.random.default_rng(0).laplace(scale=0.5, size=400_000)
    assert noise_energy(laplace, PROBLEM) == pytest.approx(ROWS * 4 * 10 * (draw**2).mean(), rel=0.02)
    assert noise_energy(NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,)), PROBLEM) == 0.0


@pytest.mark.parametrize("grid", [0.1, 0.5, 1.0, 2.0])
def test_energy_bounds_discrete_noise_on_every_grid(grid: float) -> None:
    """Exact variance of 0.5-wide noise on multiples of the grid; on a fine grid the bound is sharp."""
    steps = np.arange(-200, 201) * grid
    weights = np.exp(-(steps**2) / (2 * 0.5**2))
    variance = float((weights * steps**2).sum() / weights.sum())
    discrete = plan(distribution="discrete_gaussian", grid=grid)
    assert ROWS * 4 * 10 * variance <= noise_energy(discrete, PROBLEM) * (1 + 1e-12)
    assert grid > 0.25 or ROWS * 4 * 10 * variance == pytest.approx(noise_energy(discrete, PROBLEM), rel=1e-9)


def test_energy_follows_heads_and_visible_keys() -> None:
    heads, by_keys = (1.0, 2.0, 0.5, 3.0), (9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    # causal, aligned bottom-right: rows see 1 .. 6 keys, and 4 and 5 in each of the short batch rows
    rows = sum(n**2 for n in range(1, 7)) + 2 * (4**2 + 5**2)
    expected = rows * sum(h**2 for h in heads) * 10
    assert noise_energy(plan(head_scale=heads, row_scale=by_keys), PROBLEM) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "share"), [(LOW_RANK, 4 / 10), (SPARSE, 3 / 10)])
def test_structures_keep_their_share_of_columns(kind: Structure, share: float) -> None:
    flat, shaped = plan(), plan(structure=kind)
    assert noise_energy(shaped, PROBLEM) == pytest.approx(share * noise_energy(flat, PROBLEM))
    assert draws(shaped, PROBLEM) == pytest.approx(share * draws(flat, PROBLEM))
    assert draws(flat, PROBLEM) == ROWS * 4 * 10


def test_block_noise_has_the_trace_of_its_covariance() -> None:
    """Blocks of 4, 4 and 2 columns, eigenvalues from 1 to 1/9; a rotation changes no trace."""
    spectrum = 2 * (1 + 9 ** (-1 / 3) + 9 ** (-2 / 3) + 1 / 9) + (1 + 1 / 9)
    assert noise_energy(plan(structure=BLOCKS), PROBLEM) == pytest.approx(ROWS * 4 * 0.25 * spectrum)
    assert draws(plan(structure=BLOCKS), PROBLEM) == ROWS * 4 * 10


def test_noiseless_heads_draw_nothing_and_promise_nothing() -> None:
    open_heads = plan(head_scale=(0.0, 1.0, 0.0, 1.0), noiseless_heads=True)
    assert draws(open_heads, PROBLEM) == ROWS * 2 * 10
    assert noise_energy(open_heads, PROBLEM) == pytest.approx(ROWS * 2 * 10)
    assert plan_multiplier(open_heads, TOKEN, PROBLEM) == 0.0


def test_saving_is_what_the_tight_bound_and_the_structure_save_together() -> None:
    bound = sensitivity(TOKEN, PROBLEM)
    tight = Gaussian().plan(bound, (2.0,), PROBLEM)
    assert isotropic_energy(SEQUENCE, PROBLEM, 2.0) == pytest.approx(
        (2.0 * 2 * 1.5 * math.sqrt(6 * 4)) ** 2 * ROWS * 4 * 10, rel=1e-4
    )
    assert saving(tight, TOKEN, PROBLEM, 2.0) == pytest.approx(1 - (bound.value / bound.naive) ** 2, rel=1e-5)
    shaped = dataclasses.replace(tight, structure=LOW_RANK)
    assert saving(shaped, TOKEN, PROBLEM, 2.0) == pytest.approx(1 - 0.4 * (bound.value / bound.naive) ** 2, rel=1e-5)
    assert saving(Gaussian().plan(sensitivity(SEQUENCE, PROBLEM), (2.0,), PROBLEM), SEQUENCE, PROBLEM, 2.0) < 1e-9


@pytest.mark.parametrize("spec", [TOKEN, SEQUENCE, dataclasses.replace(TOKEN, queries="public")])
@pytest.mark.parametrize("multipliers", [(1.7,), (1.0, 2.0, 3.0, 4.0)])
def test_even_plans_have_the_multiplier_they_were_made_for(spec: PrivacySpec, multipliers: tuple[float, ...]) -> None:
    """Heads compose: each multiplier is relative to the sensitivity of one head."""
    for mechanism, power in ((Gaussian(), 2), (Laplace(), 1)):
        made = mechanism.plan(sensitivity(spec, PROBLEM, mechanism.norm), multipliers, PROBLEM)
        composed = sum(multiplier**-power for multiplier in multipliers) ** (-1 / power)
        assert composed <= plan_multiplier(made, spec, PROBLEM) <= composed * (1 + 1e-6)


@pytest.mark.parametrize("spec", [TOKEN, SEQUENCE])
@pytest.mark.parametrize(
    "mechanism",
    [LowRank(rank=4), Sparse(sparsity=0.7), Sparse(sparsity=0.7, rescale=True), BlockDiagonal(block_size=4)],
)
def test_structured_plans_have_at_least_the_multiplier_they_were_made_for(spec: PrivacySpec, mechanism: Any) -> None:
    """They plan a little more, for what their own roundings add."""
    made = mechanism.plan(sensitivity(spec, PROBLEM, mechanism.norm), (1.7,), PROBLEM)
    assert 1.7 <= plan_multiplier(made, spec, PROBLEM) <= 1.7 * (1 + 1e-3)
    if mechanism.name in ("low_rank", "sparse"):
        assert draws(made, PROBLEM) == ROWS * 4 * (4 if mechanism.name == "low_rank" else 3)
        assert noise_energy(made, PROBLEM) == pytest.approx(draws(made, PROBLEM) * made.head_scale[0] ** 2)


@pytest.mark.parametrize("queries", ["public", "private"])
def test_uneven_rows_are_added_up_one_by_one(queries: str) -> None:
    """The worst token of an uneven plan, found by looking at every token, row and head."""
    spec = dataclasses.replace(TOKEN, queries=queries)
    heads, by_keys = (0.4, 1.0, 2.0, 0.7), (0.0, 3.0, 2.5, 2.0, 0.3, 1.0, 0.8)
    seen, own = row_bounds(PROBLEM, "l2", queries)  # type: ignore[arg-type]
    worst = 0.0
    for q_len, kv_len in {*PROBLEM.lengths}:
        for key in range(kv_len):
            load = 0.0
            for row in range(q_len):
                n = row + 1 + kv_len - q_len
                move = own[n] if key == n - 1 else seen[n] if key < n else 0.0
                load += sum((move / (head * by_keys[n])) ** 2 for head in heads)
            worst = max(worst, load)
    uneven = plan(head_scale=heads, row_scale=by_keys)
    assert plan_multiplier(uneven, spec, PROBLEM) == pytest.approx(worst**-0.5, rel=1e-8)
    assert plan_multiplier(uneven, spec, PROBLEM) <= worst**-0.5


def test_a_moved_row_without_noise_breaks_the_promise_wherever_it_stands() -> None:
    silent = plan(row_scale=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0))
    assert plan_multiplier(silent, TOKEN, PROBLEM) == 0.0
    nowhere = dataclasses.replace(PROBLEM, lengths=((2, 5),) * 3)
    assert plan_multiplier(silent, TOKEN, nowhere) > 0.0
    unseen = dataclasses.replace(PROBLEM, lengths=((2, 0),) * 3)
    assert plan_multiplier(silent, TOKEN, unseen) == math.inf


def test_structures_that_stretch_the_move_lower_the_multiplier() -> None:
    flat = plan_multiplier(plan(), TOKEN, PROBLEM)
    assert plan_multiplier(plan(structure=LOW_RANK), TOKEN, PROBLEM) == flat
    assert plan_multiplier(plan(structure=SPARSE), TOKEN, PROBLEM) == pytest.approx(0.3 * flat)
    # a Euclidean clip meets the least eigenvalue, 1/9; a whitened one does not
    assert plan_multiplier(plan(structure=BLOCKS), TOKEN, PROBLEM) == pytest.approx(flat / 3)
    whitened = plan(structure=BLOCKS, norm="whitened_l2")
    assert plan_multiplier(whitened, TOKEN, PROBLEM) == pytest.approx(flat)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distribution": "custom"}, "the energy of noise is known for none, gaussian, laplace, discrete_gaussian"),
        ({"head_scale": (1.0, 1.0)}, "head_scale must hold 1 or 4 numbers, got 2"),
        ({"row_scale": (1.0, 1.0)}, "row_scale must hold 1 or 7 numbers, got 2"),
        ({"structure": structure("low_rank")}, "low_rank noise needs the parameter 'rank'"),
        ({"structure": structure("low_rank", rank=11)}, "rank must be an integer from 1 to 10, got 11"),
        ({"structure": structure("sparse", kept=2.5)}, "kept must be an integer from 1 to 10, got 2.5"),
        ({"structure": structure("block_diagonal", block_size=2, condition=0.5)}, "condition must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyParameterError, match=message):
        noise_energy(plan(**wrong), PROBLEM)


def test_a_norm_that_does_not_belong_to_the_noise_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="laplace noise must belong to a clip in l1, got 'l2'"):
        plan_multiplier(plan(distribution="laplace"), TOKEN, PROBLEM)
    with pytest.raises(PrivacyParameterError, match="a plan has a noise multiplier if"):
        plan_multiplier(plan(distribution="custom"), TOKEN, PROBLEM)
