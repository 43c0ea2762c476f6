"""Plugins made on the spot: a folder of dist-infos and modules, the only one that registries read."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpfa_core import selection
from dpfa_core.registry import ACCOUNTANTS, BACKENDS, MECHANISMS, Registry

REGISTRIES = {"mechanisms": MECHANISMS, "accountants": ACCOUNTANTS, "backends": BACKENDS}

FAKE_ACCOUNTANT = """
    class Linear:
        '''Each release of Gaussian(z) costs 1 / z.'''
        contract_version, name, bound = 1, "gdp", "upper"
        def __init__(self): self.total = 0.0
        def supports(self, event): return ()
        def compose(self, event, count=1):
            self.total += count / event.noise_multiplier
            return self
        def epsilon(self, delta): return self.total
        def delta(self, epsilon): return 0.0
        def state(self): return {}
        @classmethod
        def from_state(cls, state): return cls()
"""

BACKEND = """
    class Backend:
        contract_version, name, ops = 1, {name!r}, frozenset({{"privatize", "release"}})
        def supports(self, op, problem, plan): return {reasons!r}
        def counter_layout(self, op): return None
        def release(self, *inputs, softmax_scale): return inputs[0], None
        def release_backward(self, dout, saved): return dout, dout, dout
        def privatize_(self, x, problem, plan, tensors, key, *, clip_rows): return x
"""

MECHANISM = """
    class Mechanism:
        contract_version, name, kind, norm = 1, {name!r}, "additive", "l2"
        def __init__(self, *, rank=16): self.rank = rank
        def supports(self, spec, problem): return ()
        def calibrate(self, epsilon, delta): return 1.0
        def event(self, noise_multiplier): return None
        def plan(self, sensitivity, noise_multipliers, problem): return None
        def claims(self): return ()
"""


class PluginFolder:
    """What the site-packages of a small environment would hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(
        self,
        distribution: str,
        group: str,
        points: dict[str, str],
        modules: dict[str, str] | None = None,
        version: str = "1.0",
    ) -> None:
        """Write a distribution with entry points {name: target} and modules {name: source}."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[dp_flash_attention.{group}]\n{lines}")
        for name, source in (modules or {}).items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(source))
        self.read()

    def read(self) -> None:
        """Let all registries see this folder and nothing else that is installed."""
        importlib.invalidate_caches()
        selection._instances.clear()
        everything = list(sys.path)
        sys.path[:] = [str(self.path)]
        try:
            for registry in REGISTRIES.values():
                registry.refresh()
                registry.entries()
        finally:
            sys.path[:] = everything


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFolder]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = PluginFolder(folder)
    made.read()
    yield made
    selection._instances.clear()
    for registry in REGISTRIES.values():
        registry.refresh()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def registry() -> Callable[[str], Registry]:
    return REGISTRIES.__getitem__


@pytest.fixture
def accountant_folder(plugins: PluginFolder) -> Path:
    """A first-party accountant that charges 1 / noise_multiplier for each release."""
    plugins.add("dpfa-accounting", "accountants", {"gdp": "fake_gdp:Linear"}, {"fake_gdp": FAKE_ACCOUNTANT})
    return plugins.path


@pytest.fixture
def backend_source() -> Callable[..., str]:
    return lambda name, reasons=(): BACKEND.format(name=name, reasons=reasons)


@pytest.fixture
def mechanism_source() -> Callable[[str], str]:
    return lambda name: MECHANISM.format(name=name)
