"""The structured mechanisms against their arithmetic in floating point, and the shape of what they plan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, PrivacySpec, Sensitivity
from dpfa_mechanisms.block_diagonal import BlockDiagonal, whitened
from dpfa_mechanisms.gaussian import Gaussian
from dpfa_mechanisms.low_rank import LowRank, projected
from dpfa_mechanisms.noise_energy import noise_energy, plan_multiplier
from dpfa_mechanisms.planning import block_spectrum
from dpfa_mechanisms.rounding import output_norm
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_mechanisms.sparse import Sparse, rescaled

Array = NDArray[np.float64]
SEQUENCE = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
TOKEN = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries="private")


def problem(**more: Any) -> AttentionProblem:
    shape: dict[str, Any] = {"batch": 2, "q_len": 6, "kv_len": 6, "q_heads": 4, "kv_heads": 2, "head_dim": 24}
    return AttentionProblem(**shape | {"clip_norm": 1.0, "logit_bound": 0.5, "dtype": "bfloat16"} | more)


def plan(mechanism: Any, spec: PrivacySpec = TOKEN, multiplier: float = 2.0, **more: Any) -> Any:
    case = problem(**more)
    return mechanism.plan(sensitivity(spec, case, mechanism.norm), (multiplier,), case)


def rounded(x: Array, dtype: str) -> Array:
    if dtype != "bfloat16":
        return x.astype(dtype).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("spec", [SEQUENCE, TOKEN], ids=["sequence", "token"])
@pytest.mark.parametrize("mechanism", [LowRank(rank=5), Sparse(), Sparse(rescale=True), BlockDiagonal(block_size=10)])
def test_a_plan_keeps_its_multiplier_and_saves_energy_only_by_its_structure(mechanism: Any, spec: PrivacySpec) -> None:
    found = plan(mechanism, spec)
    assert (found.mechanism, found.norm, found.transform) == (mechanism.name, mechanism.norm, "bm32")
    assert 2.0 <= plan_multiplier(found, spec, problem()) < 2.1
    flat = dataclasses.replace(found, structure=None)
    assert noise_energy(found, problem()) < noise_energy(flat, problem())
    assert mechanism.calibrate(1.0, 1e-5) == Gaussian().calibrate(1.0, 1e-5)
    assert mechanism.event(1.5) == Gaussian().event(1.5)
    assert mechanism.supports(spec, problem()) == ()
    assert any("delta > 0" in reason for reason in mechanism.supports(dataclasses.replace(spec, delta=0.0), problem()))


@pytest.mark.parametrize(
    ("mechanism", "parameters"),
    [
        (LowRank(rank=24, seed=7), {"rank": 24}),
        (Sparse(seed=7), {"sparsity": 0.9, "kept": 2, "rescale": 0}),
        (Sparse(sparsity=0.999, rescale=True, seed=7), {"sparsity": 0.999, "kept": 1, "rescale": 1}),
        (Sparse(sparsity=0.0, seed=7), {"sparsity": 0.0, "kept": 24, "rescale": 0}),
        (BlockDiagonal(block_size=7, condition=3.0, seed=7), {"block_size": 7, "condition": 3.0}),
        (BlockDiagonal(seed=7), {"block_size": 24, "condition": 4.0}),
    ],
)
def test_the_structure_says_all_that_is_needed_to_make_it(mechanism: Any, parameters: dict[str, float]) -> None:
    structure = plan(mechanism).structure
    assert (structure.kind, dict(structure.parameters), structure.seed) == (mechanism.name, parameters, 7)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: LowRank(rank=0), "rank must be an integer >= 1"),
        (lambda: LowRank(rank=True), "rank must be an integer >= 1"),
        (lambda: LowRank(seed=-1), "seed must be an integer >= 0"),
        (lambda: plan(LowRank(rank=25)), "rank must be at most head_dim=24, got 25"),
        (lambda: Sparse(sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda: Sparse(sparsity=math.nan), r"sparsity must be in \[0, 1\)"),
        (lambda: Sparse(rescale=1), "rescale must be True or False"),  # type: ignore[arg-type]
        (lambda: BlockDiagonal(block_size=0), "block_size must be an integer >= 1"),
        (lambda: BlockDiagonal(condition=0.5), r"condition must be in \[1, 65536\], got 0.5"),
        (lambda: BlockDiagonal(condition=1e9), r"condition must be in \[1, 65536\]"),
        (lambda: BlockDiagonal().plan(sensitivity(TOKEN, problem(), "l2"), (1.0,), problem()), "in whitened_l2"),
    ],
)
def test_parameters_out_of_range_are_refused(call: Any, sentence: str) -> None:
    with pytest.raises(PrivacyParameterError, match=sentence):
        call()


def test_a_rank_above_the_head_dimension_is_a_reason_against() -> None:
    assert LowRank(rank=24).supports(TOKEN, problem()) == ()
    (reason,) = LowRank(rank=25).supports(TOKEN, problem())
    assert reason.startswith("rank must be at most head_dim=24")


@pytest.mark.parametrize(("rank", "width"), [(1, 64), (16, 64), (128, 128)])
def test_a_projection_in_float32_stays_within_its_margin(rank: int, width: int) -> None:
    """Rows along U, where nothing is lost, summed one term after the other."""
    case = problem(head_dim=width, q_heads=1, kv_heads=1, dtype="float32")
    rng = np.random.default_rng(rank)
    basis = np.linalg.qr(rng.standard_normal((width, rank)))[0].astype(np.float32)
    row = basis.astype(np.float64) @ rng.standard_normal((rank, case.q_len))
    row *= output_norm(case, "l2") / np.linalg.norm(row, axis=0)
    f = row.T.astype(np.float32)

    def product(x: Any) -> Array:
        total = np.zeros((len(x), rank), dtype=np.float32)
        for column in range(width):
            total += x[:, column : column + 1] * basis[column]
        return total.astype(np.float64)

    exact = np.linalg.norm(2.0 * f.astype(np.float64) @ basis.astype(np.float64))
    bound = projected(float(np.linalg.norm(2.0 * f.astype(np.float64))), rank, case)
    assert exact <= np.linalg.norm(product(f) - product(-f)) * (1 + 1e-6) <= bound * (1 + 1e-6)
    assert np.linalg.norm(product(f) - product(-f)) <= bound
    # and the margin is of the size of what happens, not of something else
    assert bound / exact - 1.0 < 2.0 * (width + 6) * 2.0**-24 * math.sqrt(rank)


def test_sums_that_always_round_up_need_the_margin() -> None:
    """Equal terms a little above half a step of the sum: every addition in its last binade rounds up."""
    case = problem(head_dim=64, q_heads=1, kv_heads=1, q_len=1, clip_norm=0.501, dtype="float32")
    row = np.full(64, (1.0 + 2.0**-19 + 2.0**-22) / 16.0, dtype=np.float32)
    total = np.float32(0)
    for number in row:
        total += number * np.float32(0.125)
    value = 2.0 * float(np.linalg.norm(row.astype(np.float64)))
    assert value * (1.0 + 8.0 * 2.0**-24) < 2.0 * float(total) <= projected(value, 1, case)


def test_rescaled_noise_grows_with_the_output() -> None:
    kept, grown = plan(Sparse(sparsity=0.75)), plan(Sparse(sparsity=0.75, rescale=True))
    assert 4.0 < grown.head_scale[0] / kept.head_scale[0] < 4.0 * (1 + 1e-5)
    # two rows with opposite signs, multiplied in float32 by a factor that is no float32
    case = problem(dtype="float32", q_heads=1, kv_heads=1, q_len=1)
    row = np.full(24, output_norm(case, "l2") / math.sqrt(24)).astype(np.float32)
    moved = 2.0 * np.linalg.norm((row * np.float32(1 / (1 - 0.9))).astype(np.float64))
    assert moved <= rescaled(2.0 * float(np.linalg.norm(row.astype(np.float64))), 0.9, case)


def covariance(width: int, block: int, condition: float, seed: int) -> tuple[Array, Array]:
    """(whitening matrix, mixing matrix), both symmetric, in float64."""
    rng = np.random.default_rng(seed)
    whiten, mix = np.zeros((width, width)), np.zeros((width, width))
    first = 0
    for spectrum in block_spectrum(width, block, condition):
        size = len(spectrum)
        turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
        place = slice(first, first + size)
        whiten[place, place] = turn @ np.diag(np.array(spectrum) ** -0.5) @ turn.T
        mix[place, place] = turn @ np.diag(np.array(spectrum) ** 0.5) @ turn.T
        first += size
    return whiten, mix


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("condition", [1.0, 4.0, 1000.0])
@pytest.mark.parametrize("clip_norm", [1.0, 1e-4])
def test_rounding_never_beats_the_whitened_bound(dtype: str, condition: float, clip_norm: float) -> None:
    """Extremal rows of the sequence unit, clipped, rounded and summed in float32, measured in the noise's norm."""
    width, keys = 24, 64
    case = problem(q_len=1, kv_len=keys, q_heads=1, kv_heads=1, head_dim=width, dtype=dtype, clip_norm=clip_norm)
    bound = whitened(sensitivity(SEQUENCE, case, "whitened_l2").value, 10, condition, case)
    rng, longest = np.random.default_rng(0), 0.0
    for seed in range(12):
        whiten, mix = covariance(width, 10, condition, seed)
        computed = np.linalg.inv(mix.astype(np.float32).astype(np.float64))
        # rounding errors of one sign along the direction that whitening stretches most
        steep = np.linalg.eigh(whiten)[1][:, -1]
        for direction in (steep, rng.standard_normal(width), np.sign(steep)):
            values = rounded(np.tile(direction, (keys, 1)) * rng.uniform(0.5, 4.0, (keys, 1)) * clip_norm, "float32")
            norms = np.linalg.norm((values.astype(np.float32) @ whiten.astype(np.float32)).astype(np.float64), axis=1)
            factors = np.minimum(1.0, clip_norm / (norms * (1 + 2.0**-24))).astype(np.float32)
            clipped = rounded(values.astype(np.float32) * factors[:, None], dtype)
            logits = rng.uniform(-0.5, 0.5, keys)
            weights = rounded(np.exp(logits - 0.5), dtype).astype(np.float32)
            total, norm = np.zeros(width, dtype=np.float32), np.float32(0)
            for weight, value in zip(weights, clipped.astype(np.float32), strict=True):
                total += weight * value
                norm += weight
            longest = max(longest, 2.0 * float(np.linalg.norm((total / norm).astype(np.float64) @ computed)))
    assert longest <= bound
    assert longest > 1.9 * clip_norm


def test_sums_that_round_two_columns_apart_need_the_margin() -> None:
    """Rows along the widest axis of a block of two columns: a sum's errors point along the narrowest one."""
    keys, condition = 16384, 2.0**16
    terms = np.tile(np.array([1.0 + 2.0**-11 + 2.0**-20, 1.0 + 2.0**-11 - 2.0**-20]), (keys, 1)).astype(np.float32)
    mean = (np.cumsum(terms, axis=0, dtype=np.float32)[-1] / np.float32(keys)).astype(np.float64)
    axes = np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2.0)
    exact, computed = (
        2.0 * math.hypot(*(axes @ row * np.array([1.0, math.sqrt(condition)])))
        for row in (terms[0].astype(np.float64), mean)
    )
    case = problem(q_len=1, kv_len=keys, q_heads=1, kv_heads=1, head_dim=2, dtype="float32", clip_norm=exact / 2.0)
    bound = whitened(exact, 2, condition, case)
    assert whitened(exact, 2, condition, dataclasses.replace(case, kv_len=1)) < computed <= bound


def test_unit_eigenvalues_need_no_margin_for_stretching() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        case = problem(dtype=dtype)
        assert 1.0 <= whitened(3.0, 24, 1.0, case) / 3.0 < 1.0 + 1e-4
        wide = whitened(3.0, 24, 4.0, case)
        assert 1.0 < wide / 3.0 < 1.02


def test_the_margins_are_shared_by_heads() -> None:
    """With one multiplier for each head the releases compose to what one multiplier gives."""
    for mechanism in (LowRank(rank=3), Sparse(rescale=True), BlockDiagonal()):
        bound = Sensitivity(norm=mechanism.norm, value=1.0, naive=1.0, item="given")
        one = mechanism.plan(bound, (2.0,), problem()).head_scale[0]
        each = mechanism.plan(bound, (4.0,) * 4, problem()).head_scale
        assert each == pytest.approx((one,) * 4, rel=1e-6)
