"""The verifier's own truths against published numbers, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf, quad

from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_verification.truth import counters, profiles, statistics
from dpfa_verification.truth.generators import chacha20, philox
from dpfa_verification.truth.neighbours import farthest
from dpfa_verification.truth.normals import minus_log, normals


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert philox(words(*key), words(*counter)[None])[0].tolist() == list(expected)


def test_chacha20_gives_rfc_8439s_block() -> None:
    key = np.frombuffer(bytes(range(32)), dtype="<u4")
    block = chacha20(key, words(1, 0x09000000, 0x4A000000, 0)[None])[0]
    assert block.astype("<u4").tobytes().hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c06803")


@pytest.mark.parametrize(("epsilon", "delta", "std"), [(1, 1e-5, 3.7306316349), (8, 1e-5, 0.6002290722)])
def test_gaussian_profile_gives_the_published_calibration(epsilon: float, delta: float, std: float) -> None:
    assert profiles.gaussian(epsilon, 1 / std) == pytest.approx(delta, rel=1e-8)
    assert float(profiles.gaussian_epsilon(delta, 1 / std)) == pytest.approx(epsilon, rel=1e-8)


@pytest.mark.parametrize("epsilon", [0.1, 0.7, 2.5])
@pytest.mark.parametrize("probability", [0.05, 0.9])
def test_sampled_profiles_equal_the_hockey_stick_integral(epsilon: float, probability: float) -> None:
    def density(x: mpf, mean: mpf) -> mpf:
        return mp.exp(-((x - mean) ** 2) / 2) / mp.sqrt(2 * mp.pi)

    def mixture(x: mpf, mean: mpf) -> mpf:
        return (1 - probability) * density(x, mpf(0)) + probability * density(x, mean)

    def stick(p: object, q: object) -> mpf:
        grid = [mpf(point) / 4 for point in range(-40, 41)]
        return quad(lambda x: max(0, p(x) - mp.exp(epsilon) * q(x)), grid)  # type: ignore[operator]

    mu = mpf("1.3")
    present, absent = (lambda x: mixture(x, mu)), (lambda x: density(x, mpf(0)))
    expected = max(stick(present, absent), stick(absent, present))
    assert float(profiles.sampled_gaussian(epsilon, probability, mu)) == pytest.approx(float(expected), abs=1e-6)
    expected = stick(lambda x: mixture(x, mu / 2), lambda x: mixture(x, -mu / 2))
    found = profiles.sampled_gaussian_replaced(epsilon, probability, mu)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("queries", "published"), [("private", 1.32), ("public", 0.912)])
def test_neighbours_reach_the_published_token_sensitivity(queries: str, published: float) -> None:
    spec = PrivacySpec(epsilon=1.0, delta=1e-5, unit="token", queries=queries)  # type: ignore[arg-type]
    problem = AttentionProblem(
        batch=1, q_len=32, kv_len=32, q_heads=1, kv_heads=1, head_dim=64, clip_norm=1.0, logit_bound=0.5
    )
    assert farthest(spec, problem, "l2") == pytest.approx(published, rel=3e-3)


def test_minus_log_never_rounds_to_zero() -> None:
    for bits in (32, 53):
        ends = np.array([0, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1], dtype=np.uint64)
        with mp.workdps(40):
            exact = [float(-mp.log((mpf(int(x)) + 0.5) / mpf(2) ** bits)) for x in ends]
        np.testing.assert_allclose(minus_log(ends, bits), exact, rtol=1e-15)


@pytest.mark.parametrize("generator", ["chacha20", "philox4x32-10"])
@pytest.mark.parametrize("transform", ["bm32", "bm64"])
def test_the_verifiers_own_noise_is_normal(generator: str, transform: str) -> None:
    element = np.arange(60_000)
    width = {"bm32": 2, "bm64": 4}[transform]
    per_block = (16 if generator == "chacha20" else 4) // width * 2
    zero = 0 * element
    lane = (element % per_block) // 2 * width + element % 2
    key = np.arange(8 if generator == "chacha20" else 2, dtype=np.uint32)
    values = normals(key, generator, transform, ([element // per_block, zero, zero, zero], lane))
    assert abs(statistics.standardised(values**2, 1.0, math.sqrt(2.0))) < statistics.NORMAL_LIMIT
    assert statistics.repeated_pairs(values.reshape(-1, 2)) == 0


def test_published_counter_maps_are_injective() -> None:
    axes = np.ogrid[:2, :3, :35, :37]
    at = dict(zip(("batch", "head", "row", "column"), axes, strict=True)) | {"release": np.array(7)}
    for generator in ("chacha20", "philox4x32-10"):
        found, lane = counters.release_bm32(generator, at, heads=3, columns=37)
        rows = np.stack(np.broadcast_arrays(*found, lane), axis=-1).reshape(-1, 5)
        assert len(np.unique(rows, axis=0)) == len(rows) == 2 * 3 * 35 * 37
