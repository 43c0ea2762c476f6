from __future__ import annotations

import math
import subprocess
import sys

import pytest

from dpfa_accounting.calibration import calibrate_noise_multiplier, least_epsilon
from dpfa_core.errors import PluginError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import (
    Composed,
    DiscreteGaussian,
    EpsilonDelta,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    SelfComposed,
)


def training(noise_multiplier: float) -> Event:
    return SelfComposed(PoissonSampled(0.33, Gaussian(noise_multiplier)), 90)


def releases(noise_multiplier: float) -> Event:
    return SelfComposed(Gaussian(noise_multiplier), 12)


def test_training_is_calibrated_to_just_below_the_target() -> None:
    found = calibrate_noise_multiplier(training, 3.0, 1e-4)
    spent, by_accountant, reasons = least_epsilon([training(found)], 1e-4)
    assert 3.0 * (1 - 1e-4) <= spent <= 3.0
    assert spent == min(by_accountant.values()) == by_accountant["pld"]
    assert set(by_accountant) == {"rdp", "pld", "prv"}
    assert "GDP is exact for Gaussian releases on the whole data" in reasons["gdp"]


@pytest.mark.parametrize("accountant", ["auto", "gdp", "rdp", "pld", "prv"])
def test_every_accountant_keeps_the_target_it_is_asked_for(accountant: str) -> None:
    found = calibrate_noise_multiplier(releases, 1.0, 1e-6, accountant)
    _, by_accountant, _ = least_epsilon([releases(found)], 1e-6)
    kept = by_accountant["gdp" if accountant == "auto" else accountant]
    assert 1.0 - 1e-4 <= kept <= 1.0


def test_gaussian_calibration_meets_the_analytic_value() -> None:
    found = calibrate_noise_multiplier(Gaussian, 1.0, 1e-5, relative_tolerance=1e-12)
    assert found == pytest.approx(3.7306316349, rel=1e-9)


def test_deltas_below_the_fft_fall_back_on_rdp() -> None:
    found = calibrate_noise_multiplier(training, 3.0, 1e-12)
    spent, by_accountant, reasons = least_epsilon([training(found)], 1e-12)
    assert 3.0 * (1 - 1e-4) <= spent <= 3.0
    assert list(by_accountant) == ["rdp"]
    assert "needs delta >= 1e-09" in reasons["pld"]


def test_laplace_is_calibrated_at_delta_zero() -> None:
    found = calibrate_noise_multiplier(lambda z: SelfComposed(Laplace(z), 4), 2.0, 0.0)
    assert 2.0 <= found <= 2.0 * (1 + 2e-4)


def test_a_target_that_noise_cannot_reach_is_refused() -> None:
    def half_fixed(noise_multiplier: float) -> Event:
        return Composed((Laplace(noise_multiplier), EpsilonDelta(2.0, 0.0)))

    with pytest.raises(PrivacyParameterError, match="epsilon must be one that more noise can reach, got 1"):
        calibrate_noise_multiplier(half_fixed, 1.0, 0.0)
    with pytest.raises(PrivacyParameterError, match="raise epsilon or delta"):
        calibrate_noise_multiplier(lambda _: NonPrivate(), 1.0, 1e-5)


def test_a_target_that_little_noise_keeps_ends() -> None:
    assert calibrate_noise_multiplier(lambda z: Laplace(1.0 + z), 5.0, 0.0) < 1e-8


def test_what_cannot_be_priced_is_refused_with_each_reason() -> None:
    with pytest.raises(UnsupportedEvent, match=r"no installed accountant can price this release: gdp: .* rdp: "):
        calibrate_noise_multiplier(DiscreteGaussian, 1.0, 1e-5)
    with pytest.raises(UnsupportedEvent, match="no installed accountant has a bound"):
        least_epsilon([DiscreteGaussian(1.0)], 1e-5)
    with pytest.raises(PluginError, match="nosuch"):
        calibrate_noise_multiplier(Gaussian, 1.0, 1e-5, "nosuch")


@pytest.mark.parametrize(
    ("epsilon", "delta", "text"), [(0.0, 1e-5, "epsilon"), (math.inf, 1e-5, "epsilon"), (1.0, 1.0, "delta")]
)
def test_bad_targets_are_refused(epsilon: float, delta: float, text: str) -> None:
    with pytest.raises(PrivacyParameterError, match=f"{text} must be"):
        calibrate_noise_multiplier(Gaussian, epsilon, delta)


def test_least_epsilon_takes_events_with_and_without_counts() -> None:
    assert (
        least_epsilon([Gaussian(2.0), (Gaussian(3.0), 4)], 1e-5)[0]
        == least_epsilon([(Composed((Gaussian(3.0),) * 4), 1), Gaussian(2.0)], 1e-5)[0]
    )
    assert least_epsilon([], 1e-5) == (0.0, {}, {})


def test_imports_stay_light() -> None:
    """The libraries come with the accountant that uses them, and torch never."""
    code = (
        "import sys, dpfa_accounting.calibration, dpfa_core.registry as r\n"
        "assert not {'dp_accounting', 'prv_accountant', 'scipy', 'numpy'} & set(sys.modules)\n"
        "for name in ('gdp', 'rdp', 'pld', 'prv'): r.ACCOUNTANTS.create(name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
