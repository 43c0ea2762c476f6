"""The eight rules of the registry; each plugin here is a real distribution in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from dpfa_core.errors import PluginError
from dpfa_core.registry import Registry

Get = Callable[[str], Registry]


def test_rule_1_first_party_plugins_use_the_same_door(plugins: Any, registry: Get, mechanism_source: Any) -> None:
    plugins.add("dpfa-mechanisms", "mechanisms", {"ours": "m_ours:Mechanism"}, {"m_ours": mechanism_source("ours")})
    plugins.add("acme-noise", "mechanisms", {"theirs": "m_theirs:Mechanism"}, {"m_theirs": mechanism_source("theirs")})
    listed = [(e.name, e.distribution, e.version, e.target, e.first_party) for e in registry("mechanisms").entries()]
    assert listed == [
        ("ours", "dpfa-mechanisms", "1.0", "m_ours:Mechanism", True),
        ("theirs", "acme-noise", "1.0", "m_theirs:Mechanism", False),
    ]
    assert registry("mechanisms").create("ours").name == "ours"
    assert registry("mechanisms").create("theirs", rank=3).rank == 3


def test_first_party_is_decided_by_the_normalised_distribution_name(plugins: Any, registry: Get) -> None:
    plugins.add("DPFA_Kernels.Torch", "backends", {"a": "x:y"})
    plugins.add("dpfa-kernels-torch-extra", "backends", {"b": "x:y"})
    assert [(e.name, e.first_party) for e in registry("backends").entries()] == [("a", True), ("b", False)]


def test_rule_2_listing_imports_nothing_and_loading_imports_one(
    plugins: Any, registry: Get, mechanism_source: Any
) -> None:
    names = ("m_one", "m_two")
    for name in names:
        plugins.add(name, "mechanisms", {name: f"{name}:Mechanism"}, {name: mechanism_source(name)})
    assert {entry.name for entry in registry("mechanisms").entries()} == set(names)
    assert not [name for name in names if name in sys.modules]
    registry("mechanisms").load("m_one")
    assert [name for name in names if name in sys.modules] == ["m_one"]


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (
            "import a_module_that_nobody_has\n",
            "ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
        ),
        ("raise RuntimeError('no driver')\n", "RuntimeError: no driver"),
        ("import sys; sys.exit(3)\n", "SystemExit: 3"),
        ("other = 1\n", "AttributeError"),
        ("def Thing(:\n", "SyntaxError"),
    ],
)
def test_rule_3_a_broken_plugin_asked_for_by_name_raises_with_its_cause(
    plugins: Any, registry: Get, mechanism_source: Any, source: str, cause: str
) -> None:
    plugins.add("acme-broken", "mechanisms", {"broken": "m_broken:Thing"}, {"m_broken": source}, version="2.3")
    plugins.add("fine", "mechanisms", {"fine": "m_fine:Mechanism"}, {"m_fine": mechanism_source("fine")})
    with pytest.raises(PluginError) as caught:
        registry("mechanisms").load("broken")
    text = str(caught.value)
    assert text.startswith("mechanism 'broken' of acme-broken 2.3 (m_broken:Thing) failed to load: ")
    assert cause in text
    assert text.endswith("repair or uninstall acme-broken.")
    assert {entry.name for entry in registry("mechanisms").entries()} == {"broken", "fine"}
    assert registry("mechanisms").create("fine").name == "fine"


def test_rule_3_a_plugin_that_cannot_be_created_raises_with_its_cause(
    plugins: Any, registry: Get, mechanism_source: Any
) -> None:
    plugins.add("fine", "mechanisms", {"fine": "m_fine2:Mechanism"}, {"m_fine2": mechanism_source("fine")})
    with pytest.raises(PluginError, match=r"could not be created with \{'colour': 1\}: TypeError: .*colour"):
        registry("mechanisms").create("fine", colour=1)


def test_rule_3_an_unknown_name_lists_what_is_installed(plugins: Any, registry: Get) -> None:
    plugins.add("acme", "mechanisms", {"b": "x:y", "a": "x:y"})
    with pytest.raises(PluginError, match=r"\(installed: a, b\), got 'gauss'; install the package"):
        registry("mechanisms").load("gauss")
    with pytest.raises(PluginError, match=r"\(installed: none\), got 'gauss'"):
        registry("backends").load("gauss")


def test_rule_5_a_name_provided_twice_disables_that_name_only(
    plugins: Any, registry: Get, mechanism_source: Any
) -> None:
    source = {"m_twice": mechanism_source("twice"), "m_once": mechanism_source("once")}
    plugins.add("first", "mechanisms", {"twice": "m_twice:Mechanism", "once": "m_once:Mechanism"}, source)
    plugins.add("second", "mechanisms", {"twice": "m_twice:Mechanism"})
    disabled = [entry for entry in registry("mechanisms").entries() if entry.disabled]
    assert sorted((entry.name, entry.distribution) for entry in disabled) == [
        ("twice", "first"),
        ("twice", "second"),
    ]
    reason = (
        "mechanism 'twice' is disabled: first 1.0 (m_twice:Mechanism) and second 1.0 (m_twice:Mechanism) "
        "provide the same name; uninstall all but one."
    )
    for use in (registry("mechanisms").load, registry("mechanisms").create):
        with pytest.raises(PluginError) as caught:
            use("twice")
        assert str(caught.value) == reason
    assert "m_twice" not in sys.modules
    assert registry("mechanisms").create("once").name == "once"


def test_the_same_name_in_another_group_is_no_duplicate(plugins: Any, registry: Get) -> None:
    plugins.add("first", "mechanisms", {"same": "x:y"})
    plugins.add("second", "backends", {"same": "x:y"})
    assert not any(registry(group).entry("same").disabled for group in ("mechanisms", "backends"))


@pytest.mark.parametrize("version", ["2", "0", "None", "'1'"])
def test_rule_7_a_wrong_contract_version_is_a_load_error(
    plugins: Any, registry: Get, mechanism_source: Any, version: str
) -> None:
    source = mechanism_source("old").replace("= 1, 'old'", f"= {version}, 'old'")
    assert f"= {version}, 'old'" in source
    plugins.add("acme-old", "mechanisms", {"old": "m_old:Mechanism"}, {"m_old": source})
    message = rf"'old' of acme-old 1\.0 \(m_old:Mechanism\) must state contract_version = 1, got {version}; install"
    for use in (registry("mechanisms").load, registry("mechanisms").create):
        with pytest.raises(PluginError, match=message):
            use("old")


def test_rule_7_holds_for_what_a_factory_makes(plugins: Any, registry: Get, mechanism_source: Any) -> None:
    source = mechanism_source("made").replace("contract_version, name,", "name,").replace("= 1, 'made'", "= 'made'")
    plugins.add("acme", "mechanisms", {"made": "m_made:Mechanism"}, {"m_made": source})
    with pytest.raises(PluginError, match="must state contract_version = 1, got None"):
        registry("mechanisms").create("made")


@pytest.mark.parametrize(
    ("group", "fixture", "member"),
    [
        ("mechanisms", "mechanism_source", "plan"),
        ("mechanisms", "mechanism_source", "claims"),
        ("backends", "backend_source", "privatize_"),
        ("backends", "backend_source", "counter_layout"),
    ],
)
def test_missing_members_are_named(
    plugins: Any, registry: Get, request: pytest.FixtureRequest, group: str, fixture: str, member: str
) -> None:
    source = request.getfixturevalue(fixture)("part").replace(f"def {member}(", f"def not_{member}(")
    target = "Mechanism" if group == "mechanisms" else "Backend"
    plugins.add("acme", group, {"part": f"m_part:{target}"}, {"m_part": source})
    with pytest.raises(PluginError, match=rf"must offer {member} \(contract 1\), got {target} without"):
        registry(group).create("part")


def test_a_backend_needs_the_methods_of_the_operations_it_lists(
    plugins: Any, registry: Get, backend_source: Any
) -> None:
    source = backend_source("big").replace('"release"}', '"release", "training"}')
    plugins.add("acme", "backends", {"big": "m_big:Backend"}, {"m_big": source})
    with pytest.raises(PluginError, match="must offer sqnorm, clipped_grad, add_noise_"):
        registry("backends").create("big")


def test_a_selection_mechanism_offers_select_instead_of_plan(
    plugins: Any, registry: Get, mechanism_source: Any
) -> None:
    source = mechanism_source("pick").replace('"additive"', '"selection"')
    plugins.add("acme", "mechanisms", {"pick": "m_pick:Mechanism"}, {"m_pick": source})
    with pytest.raises(PluginError, match="must offer select "):
        registry("mechanisms").create("pick")


def test_the_slow_path_needs_add_noise_only(plugins: Any, registry: Get) -> None:
    source = "class Slow:\n    def add_noise(self, tensor, sensitivity, epsilon): return tensor\n"
    plugins.add("acme", "mechanisms", {"slow": "m_slow:Slow"}, {"m_slow": source})
    assert registry("mechanisms").create("slow").add_noise(1, 1.0, 1.0) == 1


def test_a_plugin_carries_the_name_of_its_entry_point(plugins: Any, registry: Get, mechanism_source: Any) -> None:
    plugins.add("acme", "mechanisms", {"gaussian": "m_other:Mechanism"}, {"m_other": mechanism_source("laplace")})
    with pytest.raises(PluginError, match="must be named as its entry point, got 'laplace'"):
        registry("mechanisms").create("gaussian")


def test_an_entry_point_must_be_callable(plugins: Any, registry: Get) -> None:
    plugins.add("acme", "mechanisms", {"number": "m_number:value"}, {"m_number": "value = 3\n"})
    with pytest.raises(PluginError, match="must be a callable, got int"):
        registry("mechanisms").load("number")


def test_a_distribution_with_damaged_metadata_hides_nobody_else(
    plugins: Any, registry: Get, mechanism_source: Any
) -> None:
    plugins.add("fine", "mechanisms", {"fine": "m_fine3:Mechanism"}, {"m_fine3": mechanism_source("fine")})
    unreadable = plugins.path / "unreadable-1.0.dist-info"
    unreadable.mkdir()
    (unreadable / "METADATA").write_text("Name: unreadable\nVersion: 1.0\n")
    (unreadable / "entry_points.txt").write_text("[dp_flash_attention.mechanisms]\nno target here\n")
    nameless = plugins.path / "nameless-1.0.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[dp_flash_attention.mechanisms]\nnameless = x:y\n")
    plugins.read()
    listed = {(entry.name, entry.distribution, entry.first_party) for entry in registry("mechanisms").entries()}
    assert ("fine", "fine", False) in listed
    assert listed - {("fine", "fine", False)} <= {
        ("nameless", "unknown", False),
        ("nameless", "nameless", False),
    }
    assert registry("mechanisms").create("fine").name == "fine"


def test_entries_are_read_once_until_refreshed(plugins: Any, registry: Get) -> None:
    before = registry("backends").entries()
    assert registry("backends").entries() is before
    plugins.add("acme", "backends", {"late": "x:y"})
    assert [entry.name for entry in registry("backends").entries()] == ["late"]
