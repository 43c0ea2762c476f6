from __future__ import annotations

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Gaussian as GaussianEvent
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, PrivacySpec, Sensitivity
from dpfa_mechanisms.gaussian import Gaussian, gaussian_delta, gaussian_epsilon

PROBLEM = AttentionProblem(batch=1, q_len=4, kv_len=4, q_heads=4, kv_heads=2, head_dim=8, clip_norm=1.0)


def exact_delta(epsilon: float, noise_multiplier: float) -> mpmath.mpf:
    """The definition, with digits to spare for the cancellation."""
    with mpmath.workdps(60 + int(epsilon)):
        sigma, eps = mpmath.mpf(noise_multiplier), mpmath.mpf(epsilon)
        upper = mpmath.erfc(-(1 / (2 * sigma) - eps * sigma) / mpmath.sqrt(2)) / 2
        lower = mpmath.erfc((1 / (2 * sigma) + eps * sigma) / mpmath.sqrt(2)) / 2
        return upper - mpmath.exp(eps) * lower


@pytest.mark.parametrize(
    ("epsilon", "delta", "multiplier"),
    [(1.0, 1e-5, 3.7306316349), (8.0, 1e-5, 0.6002290722), (0.1, 1e-6, 36.3046904262)],
)
def test_calibration_gives_the_published_multipliers(epsilon: float, delta: float, multiplier: float) -> None:
    found = Gaussian().calibrate(epsilon, delta)
    assert found == pytest.approx(multiplier, rel=3e-10)
    # rounded up: the exact value lies at or below
    assert exact_delta(epsilon, found) <= delta
    assert exact_delta(epsilon, found * (1 - 1e-9)) > delta


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 60.0), st.floats(-60.0, -0.01))
def test_calibrated_noise_suffices_and_is_least(epsilon: float, log10_delta: float) -> None:
    delta = 10.0**log10_delta
    found = Gaussian().calibrate(epsilon, delta)
    assert exact_delta(epsilon, found) <= gaussian_delta(epsilon, found) <= delta
    assert exact_delta(epsilon, found * (1 - 1e-6)) > delta


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 60.0), st.floats(0.02, 1e4))
def test_delta_is_an_upper_bound(epsilon: float, multiplier: float) -> None:
    exact = exact_delta(epsilon, multiplier)
    bound = gaussian_delta(epsilon, multiplier)
    assert exact <= bound <= 1.0
    assert bound <= exact * (1 + 1e-6) + mpmath.mpf(10) ** -300


def test_extreme_parameters_give_numbers() -> None:
    for epsilon, delta in [(1e-12, 1e-15), (700.0, 1e-12), (5e3, 0.5), (1e-3, 1e-300), (1.0, 0.999)]:
        assert 0 < Gaussian().calibrate(epsilon, delta) < float("inf")
    assert gaussian_delta(1e200, 1.0) == 2.0**-1022
    assert gaussian_delta(0.0, 1e-3) == 1.0


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 50.0), st.floats(-30.0, -0.01))
def test_epsilon_inverts_the_calibration(epsilon: float, log10_delta: float) -> None:
    delta = 10.0**log10_delta
    multiplier = Gaussian().calibrate(epsilon, delta)
    found = gaussian_epsilon(multiplier, delta)
    assert gaussian_delta(found, multiplier) <= delta
    # both are rounded up, by a few units in the last place
    assert found <= epsilon * (1 + 1e-12) + 1e-12
    assert found == pytest.approx(epsilon, rel=1e-8, abs=1e-13)


def test_epsilon_at_the_ends() -> None:
    assert gaussian_epsilon(1e9, 1e-3) == 0.0
    assert gaussian_epsilon(1e-200, 1e-5) == float("inf")


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan"), None])
def test_bad_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyParameterError, match="epsilon must be a finite number > 0, got"):
        Gaussian().calibrate(epsilon, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, 1.5, -1e-5, float("nan")])
def test_bad_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyParameterError, match=r"delta must be in \(0, 1\), got"):
        Gaussian().calibrate(1.0, delta)


def sensitivity(value: float, norm: str = "l2") -> Sensitivity:
    return Sensitivity(norm=norm, value=value, naive=value, item="P3.sequence")  # type: ignore[arg-type]


def test_plan_rounds_up_to_float32() -> None:
    import numpy as np

    plan = Gaussian().plan(sensitivity(3.0), (0.1,), PROBLEM)
    (scale,) = plan.head_scale
    assert 0.1 * 3.0 < scale < 0.1 * 3.0 * (1 + 1e-6)
    assert float(np.float32(scale)) == scale
    assert (plan.mechanism, plan.distribution, plan.norm) == ("gaussian", "gaussian", "l2")


def test_equal_multipliers_of_heads_compose_to_the_whole() -> None:
    """Four heads at 2z, each relative to its own share, cost as much as one release at z."""
    whole = Gaussian().plan(sensitivity(3.0), (0.5,), PROBLEM)
    heads = Gaussian().plan(sensitivity(3.0), (1.0,) * 4, PROBLEM)
    assert heads.head_scale == pytest.approx(whole.head_scale * 4, rel=1e-6)


@pytest.mark.parametrize(("dtype", "transform"), [("float32", "bm64"), ("bfloat16", "bm32"), ("float16", "bm32")])
def test_plan_takes_the_sampler_its_dtype_needs(dtype: str, transform: str) -> None:
    problem = AttentionProblem(
        batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=8, clip_norm=1.0, dtype=dtype
    )
    assert Gaussian().plan(sensitivity(1.0), (1.0,), problem).transform == transform


def test_plan_refuses_what_does_not_fit() -> None:
    with pytest.raises(PrivacyParameterError, match="must hold 1 or 4 numbers"):
        Gaussian().plan(sensitivity(1.0), (1.0, 1.0), PROBLEM)
    with pytest.raises(PrivacyParameterError, match="gaussian needs a sensitivity in l2, got 'l1'"):
        Gaussian().plan(sensitivity(1.0, "l1"), (1.0,), PROBLEM)
    with pytest.raises(PrivacyParameterError, match="noise_multiplier must be a finite number > 0"):
        Gaussian().plan(sensitivity(1.0), (0.0,), PROBLEM)


def test_supports_names_each_reason() -> None:
    gaussian = Gaussian()
    assert gaussian.supports(PrivacySpec(epsilon=1.0, delta=1e-5, unit="sequence"), PROBLEM) == ()
    against = gaussian.supports(PrivacySpec(epsilon=1.0, delta=0.0, unit="sequence"), PROBLEM)
    assert against == ("the Gaussian mechanism needs delta > 0, got 0.0; use laplace for delta = 0.",)
    against = gaussian.supports(PrivacySpec(epsilon=float("inf"), delta=1e-5, unit="sequence"), PROBLEM)
    assert any("epsilon must be finite" in reason for reason in against)


def test_registry_creates_it_by_name() -> None:
    gaussian = MECHANISMS.create("gaussian")
    assert isinstance(gaussian, Gaussian)
    assert gaussian.event(2.0) == GaussianEvent(2.0)
    assert {claim.obligation for claim in gaussian.claims()} == {"calibration", "sensitivity", "noise_law"}
