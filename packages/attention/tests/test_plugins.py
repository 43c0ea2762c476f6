"""Third-party mechanisms: chosen by name, held to the contract, stopped where they contradict themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dpfa_attention import dp_flash_attn_func
from dpfa_core.errors import DPFAError, PluginError, PrivacyParameterError, UnsupportedEvent
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}

DOUBLE = """
    from dpfa_core.events import Gaussian
    from dpfa_core.spec import NoisePlan

    def multiplier(epsilon, delta):
        import math
        return 2.0 * math.sqrt(2.0 * math.log(1.25 / delta)) / epsilon

    class Plugin:
        contract_version, name, kind, norm = 1, "double", "additive", "l2"
        def supports(self, spec, problem): return ()
        def calibrate(self, epsilon, delta): return multiplier(epsilon, delta)
        def event(self, noise_multiplier): return Gaussian(noise_multiplier)
        def plan(self, sensitivity, noise_multipliers, problem):
            scale = noise_multipliers[0] * sensitivity.value * 1.000001
            return NoisePlan(mechanism=self.name, distribution="gaussian", head_scale=(scale,))
        def claims(self): return ()
"""


def test_a_third_party_mechanism_is_used_by_name(
    inputs: Callable[..., Any], ledger: Ledger, watched: Any, third_party: Callable[[str, str], None]
) -> None:
    with pytest.raises(PluginError, match=r"installed: .*gaussian, laplace"):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism="double", ledger=ledger)
    third_party("double", DOUBLE)
    _, first = dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger, return_privacy_stats=True)
    _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, mechanism="double", ledger=ledger, return_privacy_stats=True)
    assert (first.privacy_mechanism, stats.privacy_mechanism) == ("gaussian", "double")
    assert stats.noise_std > 2 * first.noise_std
    # priced by what it did, not by what was asked
    assert stats.epsilon_spent < 0.5
    lines = list(ledger.releases())
    assert ("somebodys-noise", "1.2") in lines[1].versions
    # the plan left the sampler at its default, which float32 outgrows
    assert watched.plans[-1].transform == "bm64"


BROKEN: list[tuple[str, str, type[DPFAError], str]] = [
    (
        "2.0 * math.sqrt",
        "0.5 * math.sqrt",
        PluginError,
        "mechanism 'double' of somebodys-noise 1.2 (somebodys_noise:Plugin) must cost at most epsilon=1.0 at delta=",
    ),
    ("* 1.000001", "* 0.95", PluginError, "must plan noise of scale "),
    ('head_scale=(scale,)', 'head_scale=(scale,), norm="l1"', PluginError, "and a clip in l2"),
    ('"additive"', '"selection"', PluginError, "must offer select"),
    ("supports(self, spec, problem): return ()", "supports(self, spec, problem): return ('Not on Mondays.',)",
     PrivacyParameterError, "mechanism 'double' cannot keep this promise: Not on Mondays."),
    ('distribution="gaussian"', 'distribution="custom"', PrivacyParameterError, "got custom in float32"),
    ("contract_version, name", "contract_version, name2", PluginError, "must offer name"),
    (
        "return Gaussian(noise_multiplier)",
        "return Unheard(noise_multiplier)",
        UnsupportedEvent,
        "no installed accountant can price Unheard(noise_multiplier=",
    ),
    (
        'head_scale=(scale,)',
        'head_scale=(scale,), structure=Structure(kind="sparse", parameters=(), seed=1)',
        PluginError,
        "must plan a structure that can be made; nothing was released. Correct the plugin. sparse noise needs the",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "error", "text"), BROKEN)
def test_a_mechanism_that_contradicts_itself_releases_nothing(
    inputs: Callable[..., Any],
    ledger: Ledger,
    watched: Any,
    third_party: Callable[[str, str], None],
    good: str,
    bad: str,
    error: type[DPFAError],
    text: str,
) -> None:
    assert good in DOUBLE
    source = DOUBLE.replace(good, bad).replace("import NoisePlan", "import NoisePlan, Structure")
    if "Unheard" in bad:
        source += """
    from dataclasses import dataclass
    from dpfa_core.events import Event
    @dataclass(frozen=True)
    class Unheard(Event):
        noise_multiplier: float
"""
    third_party("double", source)
    with pytest.raises(error, match=re.escape(text)):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism="double", ledger=ledger)
    assert not list(ledger.events())
    assert watched.calls == 0
    # and the others still work
    dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)


def test_a_mechanism_that_picks_is_refused(
    inputs: Callable[..., Any], ledger: Ledger, third_party: Callable[[str, str], None]
) -> None:
    source = DOUBLE.replace('"additive"', '"selection"').replace("def plan(", "def select(")
    third_party("double", source)
    with pytest.raises(PluginError, match="got 'selection'; choose another one"):
        dp_flash_attn_func(*inputs(), **PRIVATE, mechanism="double", ledger=ledger)


def test_installing_a_mechanism_changes_no_default(
    inputs: Callable[..., Any], ledger: Ledger, third_party: Callable[[str, str], None]
) -> None:
    third_party("gaussian", DOUBLE.replace('"double"', '"gaussian"'))
    with pytest.raises(PluginError, match=r"'gaussian' is disabled: .* uninstall all but one"):
        dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
