from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_accounting.calibration import Parameter, calibrate, calibrate_noise_multiplier, least_epsilon
from dpfa_core.errors import PluginError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.events import (
    Composed,
    EpsilonDelta,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    SelfComposed,
)
from dpfa_core.registry import ACCOUNTANTS


@dataclass(frozen=True)
class UnheardOf(Event):
    """A plugin's event that no accountant prices."""


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
        calibrate_noise_multiplier(lambda _: UnheardOf(), 1.0, 1e-5)
    with pytest.raises(UnsupportedEvent, match="no installed accountant has a bound"):
        least_epsilon([UnheardOf()], 1e-5)
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


TARGET = EpsilonDelta(3.0, 1e-5)


def sampled(noise_multiplier: float = 1.0, steps: int = 14062, sampling_probability: float = 256 / 60000) -> Event:
    return SelfComposed(PoissonSampled(sampling_probability, Gaussian(noise_multiplier)), steps)


def price(accountant: str, event: Event, target: EpsilonDelta) -> float:
    return float(ACCOUNTANTS.create(accountant).compose(event).epsilon(target.delta))


@pytest.mark.parametrize("accountant", ["auto", "rdp"])
@pytest.mark.parametrize("parameter", ["noise_multiplier", "steps", "sampling_probability"])
def test_each_parameter_lands_on_the_private_side_close_to_the_target(parameter: Parameter, accountant: str) -> None:
    found = calibrate(lambda value: sampled(**{parameter: value}), TARGET, parameter=parameter, accountant=accountant)
    kept = price("pld" if accountant == "auto" else "rdp", sampled(**{parameter: found}), TARGET)
    assert 3.0 * (1 - 2e-4) <= kept <= 3.0
    assert isinstance(found, int) == (parameter == "steps")


def test_a_hundred_thousand_steps_are_calibrated() -> None:
    target = EpsilonDelta(25.0, 1e-5)
    found = calibrate(lambda z: sampled(z, 100_000, 0.01), target)
    assert 25.0 * (1 - 1e-4) <= price("pld", sampled(found, 100_000, 0.01), target) <= 25.0


def test_the_most_steps_are_exact_where_the_tolerance_asks_for_it() -> None:
    for epsilon in (0.5, 1.0, 4.0):
        target = EpsilonDelta(epsilon, 1e-5)
        steps = calibrate(
            lambda n: SelfComposed(Gaussian(20.0), n), target, parameter="steps", relative_tolerance=1e-15
        )
        assert price("gdp", SelfComposed(Gaussian(20.0), steps), target) <= epsilon
        assert price("gdp", SelfComposed(Gaussian(20.0), steps + 1), target) > epsilon


def test_sampling_everybody_is_taken_where_it_is_affordable() -> None:
    assert calibrate(lambda q: sampled(50.0, 4, q), TARGET, parameter="sampling_probability") == 1.0


@pytest.mark.parametrize(
    ("parameter", "event_of", "text"),
    [
        ("noise_multiplier", lambda _: Gaussian(0.1), "epsilon must be one that more noise can reach, got 3.0"),
        ("steps", lambda n: SelfComposed(Gaussian(0.1), n), "at one step the release still costs more"),
        ("steps", lambda _: Gaussian(9.0), "steps must be limited by the target, got epsilon=3 at delta=1e-05"),
        ("sampling_probability", lambda _: Gaussian(0.1), "one that rarer sampling can reach, got 3.0"),
    ],
)
def test_targets_that_no_value_reaches_are_refused_in_one_sentence(
    parameter: Parameter, event_of: object, text: str
) -> None:
    with pytest.raises(PrivacyParameterError, match=re.escape(text)):
        calibrate(event_of, TARGET, parameter=parameter)  # type: ignore[call-overload]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 30.0), min_size=2, max_size=9),
    st.sampled_from(["noise_multiplier", "sampling_probability"]),
)
def test_a_cost_that_is_not_monotone_never_gives_a_value_that_misses(
    multipliers: list[float], parameter: Parameter
) -> None:
    """The release jumps about with the last digits of the value."""

    def event_of(value: float) -> Event:
        return Gaussian(multipliers[int(math.frexp(value)[0] * 1e6) % len(multipliers)])

    try:
        found = calibrate(event_of, TARGET, parameter=parameter, accountant="gdp")  # type: ignore[call-overload]
    except PrivacyParameterError:
        return
    assert price("gdp", event_of(found), TARGET) <= TARGET.epsilon


def test_questions_that_cannot_be_asked_are_refused() -> None:
    for arguments, text in (
        (((3.0, 1e-5),), "target must be an EpsilonDelta, got (3.0, 1e-05)"),
        ((EpsilonDelta(0.0, 1e-5),), "epsilon must be a finite number > 0, got 0.0"),
    ):
        with pytest.raises(PrivacyParameterError, match=re.escape(text)):
            calibrate(Gaussian, *arguments)  # type: ignore[arg-type]
    with pytest.raises(PrivacyParameterError, match="parameter must be one of 'noise_multiplier', 'steps'"):
        calibrate(Gaussian, TARGET, parameter="delta")  # type: ignore[call-overload]
    with pytest.raises(PrivacyParameterError, match="relative_tolerance must be a finite number > 0, got nan"):
        calibrate(Gaussian, TARGET, relative_tolerance=math.nan)
