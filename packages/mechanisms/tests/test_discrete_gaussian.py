"""The claim against exact sums over the grid, and its arithmetic against 50 digits."""

from __future__ import annotations

import dataclasses
import math

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import DiscreteGaussian as DiscreteGaussianEvent
from dpfa_core.spec import AttentionProblem, PrivacySpec
from dpfa_mechanisms.discrete_gaussian import DiscreteGaussian, concentrated_delta, default_grid, widened
from dpfa_mechanisms.gaussian import Gaussian, gaussian_delta
from dpfa_mechanisms.noise_energy import plan_multiplier
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_mechanisms.tails import released_numbers

PROBLEM = AttentionProblem(
    batch=2, q_len=5, kv_len=5, q_heads=4, kv_heads=2, head_dim=7, clip_norm=1.0, logit_bound=1.0
)
SPEC = PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence")
BOUND = sensitivity(SPEC, PROBLEM)
EPSILONS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 12.0)


def exact_delta(epsilon: float, scale: float, shift: int) -> float:
    """The hockey stick of two discrete Gaussians on the integers, summed far into both tails."""
    reach = math.ceil(40 * scale) + shift
    weight = {x: math.exp(-(x**2) / (2 * scale**2)) for x in range(-reach - shift, reach + shift + 1)}
    total = math.fsum(weight.values())
    excess = (weight[x - shift] - math.exp(epsilon) * weight[x] for x in range(-reach, reach + 1))
    return math.fsum(max(0.0, x) for x in excess) / total


def reference_delta(epsilon: float, noise_multiplier: float) -> mpmath.mpf:
    """The infimum over alpha in its published form, with 50 digits."""
    with mpmath.workdps(50):
        eps, rho = mpmath.mpf(epsilon), 1 / (2 * mpmath.mpf(noise_multiplier) ** 2)

        def slope(t: mpmath.mpf) -> mpmath.mpf:
            return (2 * t + 1) * rho - eps - mpmath.log1p(1 / t)

        low, high = mpmath.mpf(10) ** -40, (eps + 1) / rho + 1
        for _ in range(260):
            middle = mpmath.sqrt(low * high)
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        alpha = 1 + low
        bound = mpmath.exp((alpha - 1) * (alpha * rho - eps)) / (alpha - 1) * (1 - 1 / alpha) ** alpha
        return min(bound, mpmath.mpf(1))


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_delta_on_the_grid_never_exceeds_the_claim(scale: float, shift: int) -> None:
    for epsilon in EPSILONS:
        assert exact_delta(epsilon, scale, shift) <= concentrated_delta(epsilon, scale / shift)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("move", [0.02, 0.6, 1.7])
def test_rounding_to_the_grid_is_paid_by_the_widened_sensitivity(scale: float, move: float) -> None:
    """Values a little apart may round to grid points one step further apart than they are."""
    one = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1, clip_norm=1.0)
    shift = math.ceil(move)
    assert shift in {round(x / 97 + move) - round(x / 97) for x in range(200)}
    for epsilon in EPSILONS:
        assert exact_delta(epsilon, scale, shift) <= concentrated_delta(epsilon, scale / widened(move, 1.0, one))
    # what the values' own distance would claim is exceeded
    assert any(exact_delta(e, scale, shift) > concentrated_delta(e, scale / move) for e in EPSILONS)


def test_the_formula_of_the_continuous_gaussian_fails_on_a_coarse_grid() -> None:
    ratios = [exact_delta(e / 4, 0.5, 1) / gaussian_delta(e / 4, 0.5) for e in range(60)]
    assert max(ratios) > 4.5
    # and on a fine one it nearly holds: a grid is no loss
    assert exact_delta(1.0, 30.0, 30) == pytest.approx(gaussian_delta(1.0, 1.0), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 60.0), st.floats(0.05, 1e4))
def test_delta_is_the_infimum_rounded_up(epsilon: float, multiplier: float) -> None:
    exact, bound = reference_delta(epsilon, multiplier), concentrated_delta(epsilon, multiplier)
    assert exact * (1 - mpmath.mpf(10) ** -30) <= bound <= exact * (1 + mpmath.mpf("1e-9")) + mpmath.mpf(10) ** -300


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 30.0), st.floats(-30.0, -0.1))
def test_calibrated_noise_suffices_and_is_least(epsilon: float, log10_delta: float) -> None:
    delta = 10.0**log10_delta
    found = DiscreteGaussian().calibrate(epsilon, delta)
    assert reference_delta(epsilon, found) <= delta
    assert reference_delta(epsilon, found * (1 - 1e-9)) > delta
    assert found >= Gaussian().calibrate(epsilon, delta)


def test_extreme_parameters_give_numbers() -> None:
    for epsilon, delta in [(1e-12, 1e-15), (700.0, 1e-12), (5e3, 0.5), (1e-3, 1e-300), (1.0, 0.999), (1e300, 1e-5)]:
        assert 0 < DiscreteGaussian().calibrate(epsilon, delta) < math.inf
    assert concentrated_delta(1.0, 1e-200) == concentrated_delta(0.0, 1e-3) == 1.0
    assert concentrated_delta(1.0, 1e200) < 1e-200


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 1e9), st.integers(1, 4000), st.integers(1, 300))
def test_default_grid_is_the_largest_power_of_two_within_a_hundredth(value: float, rows: int, width: int) -> None:
    problem = dataclasses.replace(PROBLEM, q_len=rows, head_dim=width)
    grid = default_grid(value, problem)
    assert math.frexp(grid)[0] == 0.5
    root = math.sqrt(released_numbers(problem))
    assert value + grid * root <= widened(value, grid, problem) <= 1.01 * value
    assert value + 2 * grid * root > 1.0099999 * value


@pytest.mark.parametrize("multipliers", [(2.0,), (2.0, 3.0, 4.0, 5.0)])
def test_plan_scales_the_widened_sensitivity_up(multipliers: tuple[float, ...]) -> None:
    plan = DiscreteGaussian(grid=0.125).plan(BOUND, multipliers, PROBLEM)
    assert (plan.distribution, plan.norm, plan.grid) == ("discrete_gaussian", "l2", 0.125)
    # 5 rows, 4 heads, 7 columns that are drawn in pairs
    whole = BOUND.value + 0.125 * math.sqrt(5 * 4 * 8)
    share = whole / math.sqrt(len(multipliers))
    for scale, multiplier in zip(plan.head_scale, multipliers, strict=True):
        assert share * multiplier < scale < share * multiplier * (1 + 1e-6)
    if len(multipliers) == 1:
        assert 2.0 <= plan_multiplier(plan, SPEC, PROBLEM) <= 2.0 * (1 + 1e-6)


def test_default_plan_costs_at_most_a_hundredth_more_noise() -> None:
    plan = DiscreteGaussian().plan(BOUND, (1.0,), PROBLEM)
    assert plan.grid == default_grid(BOUND.value, PROBLEM)
    assert BOUND.value < plan.head_scale[0] <= 1.01 * BOUND.value * (1 + 1e-6)


def test_supports_what_the_gaussian_supports_and_names_each_reason() -> None:
    assert DiscreteGaussian().supports(SPEC, PROBLEM) == ()
    assert DiscreteGaussian(grid=0.25).supports(SPEC, PROBLEM) == ()
    no_delta = dataclasses.replace(SPEC, delta=0.0)
    assert DiscreteGaussian().supports(no_delta, PROBLEM) == (
        "the discrete Gaussian needs delta > 0, got 0.0; use laplace for delta = 0.",
    )
    for spec, problem in [
        (dataclasses.replace(SPEC, epsilon=math.inf), PROBLEM),
        (SPEC, dataclasses.replace(PROBLEM, clip_norm=None)),
        (dataclasses.replace(SPEC, unit="token", queries="private"), dataclasses.replace(PROBLEM, logit_bound=None)),
        (SPEC, dataclasses.replace(PROBLEM, dtype="float64")),
    ]:
        assert DiscreteGaussian(grid=0.25).supports(spec, problem) == Gaussian().supports(spec, problem) != ()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (0.0, "grid must be a finite number > 0, got 0.0; None chooses one."),
        (-1.0, "grid must be a finite number > 0, got -1.0; None chooses one."),
        (math.nan, "grid must be a finite number > 0, got nan; None chooses one."),
        ("fine", "grid must be a finite number > 0, got 'fine'; None chooses one."),
        (0.3, "grid must be a power of two, so that its multiples are exact, got 0.3; choose 0.25."),
    ],
)
def test_a_wrong_grid_is_refused_before_and_while_planning(grid: float, message: str) -> None:
    mechanism = DiscreteGaussian(grid=grid)
    assert mechanism.supports(SPEC, PROBLEM) == (message,)
    with pytest.raises(PrivacyParameterError) as refusal:
        mechanism.plan(BOUND, (1.0,), PROBLEM)
    assert str(refusal.value) == message


def test_noise_narrower_than_its_grid_is_refused() -> None:
    """In few numbers with a large epsilon a grid can swallow the noise."""
    one = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=2, clip_norm=1.0)
    (reason,) = DiscreteGaussian(grid=64.0).supports(dataclasses.replace(SPEC, epsilon=20.0), one)
    assert reason.startswith("grid must not exceed the noise, which has the scale ")


def test_its_price_is_its_own_event() -> None:
    assert DiscreteGaussian().event(2.0) == DiscreteGaussianEvent(2.0)
    assert {claim.obligation for claim in DiscreteGaussian().claims()} == {"calibration", "sensitivity", "noise_law"}
    with pytest.raises(PrivacyParameterError, match="epsilon must be a finite number > 0"):
        DiscreteGaussian().calibrate(math.inf, 1e-5)
    with pytest.raises(PrivacyParameterError, match=r"delta must be in \(0, 1\), got 0"):
        DiscreteGaussian().calibrate(1.0, 0.0)
