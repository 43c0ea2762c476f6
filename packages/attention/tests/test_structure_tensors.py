from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpfa_attention.structure_tensors import structure_tensors
from dpfa_core.contracts import PlanTensors
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Structure
from dpfa_mechanisms.planning import block_spectrum

CPU = torch.device("cpu")
PARAMETERS: dict[str, dict[str, float]] = {
    "low_rank": {"rank": 7},
    "sparse": {"sparsity": 0.75, "kept": 5, "rescale": 0},
    "block_diagonal": {"block_size": 8, "condition": 9.0},
}


def made(kind: str, seed: int = 0, D: int = 20, norm: str = "", **parameters: float) -> PlanTensors:
    problem = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=D)
    known = tuple((PARAMETERS[kind] | parameters).items())
    fields: dict[str, Any] = {"norm": norm or ("whitened_l2" if kind == "block_diagonal" else "l2")}
    structure = Structure(kind=kind, parameters=known, seed=seed)  # type: ignore[arg-type]
    plan = NoisePlan(mechanism=kind, distribution="gaussian", head_scale=(1.0,), structure=structure, **fields)
    return structure_tensors(plan, problem, CPU)


def test_low_rank_columns_are_orthonormal_and_rounded_once() -> None:
    tensors = made("low_rank")
    assert torch.equal(tensors.project, tensors.mix)
    assert tensors.project.shape == (20, 7)
    assert tensors.project.dtype == torch.float32
    gram = tensors.project.double().T @ tensors.project.double()
    assert (gram - torch.eye(7, dtype=torch.float64)).abs().max() < 2 * 2.0**-24


def test_a_row_of_a_random_rotation_points_anywhere() -> None:
    """Mean 0, variance 1 / D in every entry: signs of the decomposition would make the first ones positive."""
    first = torch.stack([made("low_rank", seed, D=4, rank=4).project for seed in range(400)]).double()
    assert first.mean(0).abs().max() < 4.5 / math.sqrt(4 * 400)
    assert (4 * first.square().mean(0) - 1).abs().max() < 4.5 * math.sqrt(1.0 / 400)


def test_sparse_keeps_columns_of_the_identity() -> None:
    plain, wide = made("sparse"), made("sparse", rescale=1)
    assert plain.mix.shape == (20, 5)
    assert torch.equal(plain.mix, plain.project)
    assert (plain.mix.sum(0) == 1).all()
    assert ((plain.mix == 0) | (plain.mix == 1)).all()
    assert plain.mix.sum(1).max() == 1
    assert torch.equal(wide.mix, plain.mix)
    assert torch.equal(wide.project, 4 * plain.mix)


@pytest.mark.parametrize("D", [20, 17])
def test_blocks_have_the_planned_spectrum_and_whitening_inverts_them(D: int) -> None:
    tensors = made("block_diagonal", D=D)
    assert tensors.project is None
    mix, whiten = tensors.mix.double(), tensors.whiten.double()
    assert (mix @ whiten - torch.eye(D, dtype=torch.float64)).abs().max() < 1e-6
    first = 0
    for eigenvalues in block_spectrum(D, 8, 9.0):
        block = slice(first, first + len(eigenvalues))
        found = torch.linalg.eigvalsh(mix[block, block] @ mix[block, block].T)
        torch.testing.assert_close(found, torch.tensor(sorted(eigenvalues), dtype=torch.float64), rtol=1e-5, atol=0)
        assert (mix[block, :first] == 0).all()
        first += len(eigenvalues)
    assert not torch.equal(tensors.mix[:8, :8], tensors.mix[8:16, 8:16])


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_seed_gives_the_same_tensors_and_another_one_others(kind: str) -> None:
    from dpfa_attention.structure_tensors import _made

    one, other = made(kind, seed=1), made(kind, seed=2)
    assert made(kind, seed=1) is one
    _made.cache_clear()
    assert torch.equal(made(kind, seed=1).mix, one.mix)
    assert not torch.equal(other.mix, one.mix)


def test_what_is_kept_does_not_depend_on_the_modes_of_the_first_call() -> None:
    with torch.inference_mode(), torch.device("meta"):
        whiten = made("block_diagonal", seed=77).whiten
    assert (whiten.is_inference(), whiten.device) == (False, CPU)
    x = torch.ones(20, requires_grad=True)
    (x @ whiten).sum().backward()


def test_the_bits_of_a_seed_never_change() -> None:
    """A ledger that names a seed must mean the same structure for good."""
    assert made("sparse", seed=5).mix.argmax(0).tolist() == [1, 13, 15, 17, 18]
    assert made("low_rank", seed=5).mix[0, :3].tolist() == pytest.approx([0.3139645, -0.0347636, 0.0341152], rel=1e-5)


def test_a_plan_without_structure_needs_no_tensors() -> None:
    problem = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=4)
    plan = NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(1.0,))
    assert structure_tensors(plan, problem, CPU) == PlanTensors()


def test_a_euclidean_clip_needs_nothing_that_whitens() -> None:
    assert made("block_diagonal", norm="l2").whiten is None


@pytest.mark.parametrize(
    ("kind", "wrong", "text"),
    [
        ("low_rank", {"rank": 21}, r"rank must be an integer from 1 to 20, got 21\.0"),
        ("low_rank", {"rank": 2.5}, r"rank must be an integer"),
        ("sparse", {"kept": math.inf}, r"kept must be an integer"),
        ("sparse", {"rescale": 1, "sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ("block_diagonal", {"condition": 0.5}, "condition must be at least 1"),
        ("block_diagonal", {"condition": 1e9}, "condition must be at most 65536"),
    ],
)
def test_parameters_out_of_range_are_refused(kind: str, wrong: dict[str, float], text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=text):
        made(kind, **wrong)
