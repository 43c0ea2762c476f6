from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import ncx2

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem
from dpfa_mechanisms.gaussian import Gaussian, gaussian_delta
from dpfa_mechanisms.tails import (
    RADII,
    _pair_cost,
    delta_after_tail,
    delta_with_tail,
    gaussian_tail,
    laplace_tail,
    released_numbers,
    tail_radius,
)

LAST_RADIUS_32 = math.sqrt(2 * 33 * math.log(2))


def pair_cost(shift: float, radius: float) -> float:
    """The definition, by quadrature over the distance from the centre."""

    def outside(r: float) -> float:
        cosine = (radius**2 - r**2 - shift) / (2 * r * math.sqrt(shift))
        return math.acos(min(1.0, max(-1.0, cosine))) / math.pi

    start = max(1e-12, radius - math.sqrt(shift))
    value, _ = quad(lambda r: r * math.exp(-r * r / 2) * outside(r), start, radius, limit=400, epsabs=0)
    return value / -math.expm1(-(radius**2) / 2)


@pytest.mark.parametrize("radius", [4.1, 6.0, 6.764])
@pytest.mark.parametrize("shift", [1e-9, 1e-4, 0.1, 1.0, 4.0, 12.0])
def test_pair_cost_bounds_its_integral(shift: float, radius: float) -> None:
    exact = pair_cost(shift, radius)
    assert exact * (1 - 1e-6) <= _pair_cost(shift, radius) <= exact * 1.01


def test_pair_cost_bounds_the_noncentral_chi_square() -> None:
    """Mass outside after the shift, less what was outside before, cannot exceed it."""
    for shift in (0.01, 1.0, 9.0):
        gained = ncx2.sf(36.0, 2, shift) - math.exp(-18.0)
        assert _pair_cost(shift, 6.0) >= gained


@pytest.mark.parametrize(("numbers", "published"), [(10**5, 5.7e-8), (10**7, 5.6e-7)])
def test_tail_of_32_bit_box_muller(numbers: int, published: float) -> None:
    assert pytest.approx(6.76, abs=0.01) == LAST_RADIUS_32
    # published to two digits; a bound may lie above, never below
    tail = gaussian_tail(1.0, numbers=numbers, radius=LAST_RADIUS_32)
    assert 0.99 * published <= tail <= 1.05 * published


def test_tail_of_a_short_sampler_exceeds_common_deltas() -> None:
    assert gaussian_tail(1.0, numbers=10**7, radius=5.768) == pytest.approx(2.5e-4, rel=0.05)


def test_tail_covers_every_way_to_spread_the_move() -> None:
    radius, numbers, multiplier = 5.0, 1000, 0.7
    tail = gaussian_tail(multiplier, numbers=numbers, radius=radius)
    most = multiplier**-2
    for used in (1, 2, 5, 20, 100, 500):
        assert used * pair_cost(most / used, radius) <= tail


def test_total_delta_bounds_the_truncated_mechanism_in_one_pair() -> None:
    """The hockey stick of two shifted discs, integrated on a grid, stays below the bound."""
    radius, multiplier, epsilon = 3.0, 1.0, 1.5
    axis = np.arange(-radius, radius + 1, 0.005)
    x, y = np.meshgrid(axis, np.arange(-radius, radius, 0.005))
    inside = -math.expm1(-(radius**2) / 2) * 2 * math.pi
    here = np.where((x - 1) ** 2 + y**2 <= radius**2, np.exp(-((x - 1) ** 2 + y**2) / 2), 0.0) / inside
    there = np.where(x**2 + y**2 <= radius**2, np.exp(-(x**2 + y**2) / 2), 0.0) / inside
    delta = np.clip(here - math.exp(epsilon) * there, 0.0, None).sum() * 0.005**2
    ideal = gaussian_delta(epsilon, multiplier)
    bound = delta_with_tail(ideal, noise_multiplier=multiplier, numbers=2, radius=radius)
    assert ideal < delta <= bound


def test_tail_grows_with_numbers_and_shrinks_with_noise_and_radius() -> None:
    base = gaussian_tail(1.0, numbers=10**4, radius=6.0)
    assert gaussian_tail(1.0, numbers=10**5, radius=6.0) > base
    assert gaussian_tail(2.0, numbers=10**4, radius=6.0) < base
    assert gaussian_tail(1.0, numbers=10**4, radius=6.4) < base
    assert gaussian_tail(0.1, numbers=10**4, radius=6.0) == 1.0


def test_calibration_after_the_tail_keeps_the_whole_delta() -> None:
    epsilon, delta, numbers, radius = 2.0, 1e-6, 10**5, 6.4
    gaussian = Gaussian()
    first = gaussian.calibrate(epsilon, delta)
    left = delta_after_tail(delta, noise_multiplier=first, numbers=numbers, radius=radius)
    final = gaussian.calibrate(epsilon, left)
    assert left < delta
    assert final > first
    ideal = gaussian_delta(epsilon, final)
    assert delta_with_tail(ideal, noise_multiplier=final, numbers=numbers, radius=radius) <= delta
    assert (
        delta_with_tail(gaussian_delta(epsilon, first), noise_multiplier=first, numbers=numbers, radius=radius) > delta
    )


def test_what_is_left_after_the_tail_adds_up_again() -> None:
    for multiplier, numbers, radius in [(1e3, 10**5, 4.0), (1.0, 10**4, 6.0)]:
        sampler = {"noise_multiplier": multiplier, "numbers": numbers, "radius": radius}
        left = delta_after_tail(1e-3, **sampler)  # type: ignore[arg-type]
        assert 0.999e-3 < delta_with_tail(left, **sampler) <= 1e-3  # type: ignore[arg-type]


def test_tail_larger_than_delta_is_refused_with_a_remedy() -> None:
    with pytest.raises(PrivacyParameterError, match="raise delta, lower epsilon, or release in a dtype"):
        delta_after_tail(1e-9, noise_multiplier=1.0, numbers=10**7, radius=6.0)


@pytest.mark.parametrize(("dtype", "bits"), list(RADII))
def test_radius_ends_where_gaps_reach_the_rounding_step(dtype: str, bits: int) -> None:
    radius = tail_radius(dtype, bits)
    mantissa = {"bfloat16": 7, "float16": 10, "float32": 23}[dtype]
    step = 2.0 ** (math.floor(math.log2(radius)) - mantissa)
    gap = 2.0**-bits * math.exp(radius**2 / 2) / radius
    assert gap <= step
    assert radius <= math.sqrt(2 * (bits + 1) * math.log(2))


def test_unknown_radius_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"a tail radius is known for .*, got \('float64', 53\)"):
        tail_radius("float64", 53)


def test_released_numbers_are_those_of_the_longest_row_in_pairs() -> None:
    problem = AttentionProblem(
        batch=2, q_len=8, kv_len=8, q_heads=4, kv_heads=2, head_dim=5, lengths=((3, 8), (6, 2)), clip_norm=1.0
    )
    assert released_numbers(problem) == 6 * 4 * 6


def test_laplace_tail_is_the_mass_the_neighbour_cannot_reach() -> None:
    epsilon, end = 1.3, 9.0
    mass, _ = quad(lambda x: 0.5 * math.exp(-abs(x - epsilon)), end, end + epsilon)
    assert laplace_tail(1 / epsilon, end=end) == pytest.approx(mass / -math.expm1(-end), rel=1e-9)
    # moving two numbers by half each costs less
    assert 2 * laplace_tail(2 / epsilon, end=end) < laplace_tail(1 / epsilon, end=end)
