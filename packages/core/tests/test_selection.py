"""Which backend runs: rule 4 (a failure is a recorded reason) and rule 6 (never third-party code)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dpfa_core import selection
from dpfa_core.errors import BackendUnavailable, PluginError
from dpfa_core.spec import AttentionProblem

THIRD_PARTY = "third party: chosen only when asked for by name."


def choose(backend: str = "auto", op: str = "privatize") -> selection.Selection:
    return selection.select(op, None, None, backend)


def add(plugins: Any, source: str, distribution: str, name: str) -> None:
    module = f"b_{distribution.replace('-', '_')}_{name}"
    plugins.add(distribution, "backends", {name: f"{module}:Backend"}, {module: source})


def test_the_trace_says_how_to_install_what_is_missing(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    chosen = choose()
    assert chosen.name == "torch"
    assert chosen.trace == (
        ("cuda", ("not installed: pip install dpfa-kernels-cuda",)),
        ("triton", ("not installed: pip install dpfa-kernels-triton",)),
        ("cpu", ("not installed: pip install dpfa-kernels-cpu",)),
        ("torch", ()),
    )
    assert "triton: not installed: pip install dpfa-kernels-triton" in chosen.explain()
    assert "torch: can run it" in chosen.explain()


def test_auto_takes_the_first_backend_without_a_reason_against(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    add(plugins, backend_source("triton", ("no GPU here.",)), "dpfa-kernels-triton", "triton")
    add(plugins, backend_source("cpu"), "dpfa-kernels-cpu", "cpu")
    chosen = choose()
    assert chosen.name == "cpu"
    assert dict(chosen.trace) == {
        "cuda": ("not installed: pip install dpfa-kernels-cuda",),
        "triton": ("no GPU here.",),
        "cpu": (),
        "torch": (),
    }


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (("    class Backend", "    import missing_toolkit\n    class Backend"), "missing_toolkit"),
        (("= 1, 'triton'", "= 7, 'triton'"), "contract_version = 1, got 7"),
        (("return ()", "raise RuntimeError('driver too old')"), "RuntimeError: driver too old"),
        (('frozenset({"privatize", "release"})', "None"), "NoneType"),
    ],
)
def test_rule_4_a_failure_under_auto_is_a_reason_and_the_others_still_run(
    plugins: Any, backend_source: Any, damage: tuple[str, str], reason: str
) -> None:
    source = backend_source("triton")
    assert damage[0] in source
    add(plugins, source.replace(*damage), "dpfa-kernels-triton", "triton")
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    chosen = choose()
    assert chosen.name == "torch"
    assert reason in dict(chosen.trace)["triton"][0]
    with pytest.raises(PluginError, match=reason):
        choose("triton")


def test_rule_6_auto_never_picks_third_party_code(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("fast"), "acme-fast", "fast")
    add(plugins, backend_source("cuda"), "acme-cuda", "cuda")
    with pytest.raises(BackendUnavailable) as caught:
        choose()
    assert f"fast: {THIRD_PARTY}" in str(caught.value)
    assert f"cuda: {THIRD_PARTY}" in str(caught.value)
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    chosen = choose()
    assert chosen.name == "torch"
    assert dict(chosen.trace)["fast"] == dict(chosen.trace)["cuda"] == (THIRD_PARTY,)
    assert choose("fast") == selection.Selection("fast", (("fast", ()),))


@pytest.mark.parametrize("other", ["acme", "zzz"])
def test_a_name_that_a_third_party_doubles_is_disabled_and_the_next_one_runs(
    plugins: Any, backend_source: Any, other: str
) -> None:
    add(plugins, backend_source("triton"), "dpfa-kernels-triton", "triton")
    add(plugins, backend_source("triton"), other, "triton")
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    chosen = choose()
    assert chosen.name == "torch"
    assert "provide the same name; uninstall all but one." in dict(chosen.trace)["triton"][0]


def test_a_backend_asked_for_by_name_is_never_replaced(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    add(plugins, backend_source("cpu", ("head_dim must be 64.",)), "dpfa-kernels-cpu", "cpu")
    message = "backend 'cpu' cannot run 'privatize' here: head_dim must be 64. Choose another one"
    with pytest.raises(BackendUnavailable, match=message):
        choose("cpu")
    with pytest.raises(PluginError, match="got 'cuda'; install the package"):
        choose("cuda")


def test_an_operation_that_is_not_offered_is_a_reason(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    with pytest.raises(BackendUnavailable, match="torch: does not offer the operation 'training'"):
        choose(op="training")


@pytest.mark.parametrize(
    ("accepts", "reasons"),
    [
        ("", ("its release takes no bias of the logits: leave out alibi_slopes and additive masks.",)),
        (", bias=None", ()),
        (", **more", ()),
    ],
)
def test_a_release_that_takes_no_bias_is_not_asked_for_one(
    plugins: Any, backend_source: Any, accepts: str, reasons: tuple[str, ...]
) -> None:
    source = backend_source("fast")
    assert "*inputs, softmax_scale)" in source
    add(plugins, source.replace("*inputs, softmax_scale)", f"*inputs, softmax_scale{accepts})"), "acme-fast", "fast")
    plain = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1)
    biased = dataclasses.replace(plain, biased=True)
    assert selection.select("release", plain, None, "fast").name == "fast"
    assert selection.select("privatize", biased, None, "fast").name == "fast"
    if not reasons:
        assert selection.select("release", biased, None, "fast").name == "fast"
        return
    with pytest.raises(BackendUnavailable, match=f"backend 'fast' cannot run 'release' here: {reasons[0]} Choose"):
        selection.select("release", biased, None, "fast")


def test_one_object_per_process(plugins: Any, backend_source: Any) -> None:
    add(plugins, backend_source("torch"), "dpfa-kernels-torch", "torch")
    assert selection.backend("torch") is selection.backend("torch")
