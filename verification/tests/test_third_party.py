"""Third-party packages: a good one passes, the broken ones are rejected, and no one else suffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dpfa_core import selection
from dpfa_core.errors import PluginError
from dpfa_core.registry import BACKENDS, MECHANISMS
from dpfa_core.spec import AttentionProblem
from dpfa_verification.conformance import check_accountant, check_backend, check_mechanism, render, verify
from dpfa_verification.conformance.bench import SILENT

Use = Callable[[str], Path]


def test_a_good_third_party_mechanism_is_found_and_passes(use: Use) -> None:
    use("power_of_two")
    entry = MECHANISMS.entry("power_of_two")
    assert (entry.distribution, entry.version, entry.first_party) == ("acme-power-of-two", "2.1", False)
    report = check_mechanism("power_of_two")
    assert report.ok, render(report)
    assert report.origin == "acme-power-of-two 2.1 (acme_power_of_two.mechanism:PowerOfTwo)"
    verdicts = {claim.obligation: verdict for claim, verdict, _ in report.obligations}
    assert verdicts["calibration"] == "tested"
    assert verdicts["quiet_price"] == "assumed"


def test_a_std_five_percent_short_is_rejected(use: Use) -> None:
    use("broken")
    report = check_mechanism("short_gaussian", level="quick")
    assert not report.ok
    assert report.failed() == ("calibration", "event", "moves", "heads")
    assert "leave delta = " in render(report)


def test_noise_that_does_not_depend_on_the_key_is_rejected(use: Use) -> None:
    use("broken")
    report = check_backend("reused_noise", level="quick")
    assert not report.ok
    assert report.failed() == ("noise_depends_on_key", "noise_bits")


def test_an_accountant_below_the_exact_gaussian_is_rejected(use: Use) -> None:
    use("broken")
    report = check_accountant("optimist", level="quick")
    assert not report.ok
    assert {"gaussian_exact", "single_release"} == set(report.failed())
    assert "exact is" in render(report)


def test_a_plugin_that_cannot_be_loaded_has_failed_and_the_others_are_usable(
    distribution: Callable[..., None],
) -> None:
    distribution("acme-crash", "mechanisms", {"crash": "acme_crash:Thing"}, {"acme_crash": "import no_such_module\n"})
    report = check_mechanism("crash")
    assert (report.ok, report.failed()) == (False, ("load",))
    text = render(report)
    assert "FAILED: mechanism crash, acme-crash 3.0 (acme_crash:Thing)" in text
    assert "No module named 'no_such_module'; repair or uninstall acme-crash." in " ".join(text.split())
    assert {"crash", "gaussian", "laplace"} <= {entry.name for entry in MECHANISMS.entries()}
    assert check_mechanism("gaussian", level="quick").ok
    reports = verify(("crash", "laplace"), "quick")
    assert [(report.name, report.ok) for report in reports] == [("crash", False), ("laplace", True)]


def test_a_name_provided_twice_has_failed_and_disables_that_name_only(distribution: Callable[..., None]) -> None:
    distribution("acme-copy", "mechanisms", {"gaussian": "dpfa_mechanisms.gaussian:Gaussian"})
    report = check_mechanism("gaussian")
    assert report.failed() == ("load",)
    assert "acme-copy 3.0" in report.origin
    assert "provide the same name; uninstall all but one" in render(report)
    assert check_mechanism("laplace", level="quick").ok


def test_auto_never_picks_third_party_code(use: Use) -> None:
    use("broken")
    problem = AttentionProblem(batch=1, q_len=4, kv_len=4, q_heads=1, kv_heads=1, head_dim=4)
    chosen = selection.select("release", problem, SILENT)
    assert not BACKENDS.entry("reused_noise").first_party
    assert BACKENDS.entry(chosen.name).first_party
    assert dict(chosen.trace)["reused_noise"] == ("third party: chosen only when asked for by name.",)
    assert selection.select("release", problem, SILENT, "reused_noise").name == "reused_noise"


def test_a_name_that_is_not_installed_is_an_error() -> None:
    for check in (check_mechanism, check_accountant, check_backend):
        with pytest.raises(PluginError, match="got 'nobody'; install the package"):
            check("nobody")
    with pytest.raises(PluginError, match=r"\(installed: .*gaussian.*\), got nobody"):
        verify(("gaussian", "nobody"))


def test_another_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="level must be one of 'quick', 'default', 'full', got 'slow'"):
        check_mechanism("gaussian", level="slow")  # type: ignore[arg-type]
