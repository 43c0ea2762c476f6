"""Third-party packages, built from their own pyproject and installed into a folder of their own."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpfa_core import selection
from dpfa_core.registry import ACCOUNTANTS, BACKENDS, MECHANISMS

PLUGINS = Path(__file__).parent / "plugins"


def refresh() -> None:
    importlib.invalidate_caches()
    selection._instances.clear()
    for registry in (MECHANISMS, ACCOUNTANTS, BACKENDS):
        registry.refresh()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with one plugin package installed, by pip and without an index."""
    found: dict[str, Path] = {}

    def install(package: str) -> Path:
        if package not in found:
            source = tmp_path_factory.mktemp("source") / package
            shutil.copytree(PLUGINS / package, source)
            target = tmp_path_factory.mktemp(package)
            options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
            command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
            subprocess.run(command, check=True, timeout=120)
            found[package] = target
        return found[package]

    return install


@pytest.fixture
def use(installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Make plugin packages visible to the registries for the time of one test."""

    def see(package: str) -> Path:
        folder = installed(package)
        monkeypatch.syspath_prepend(str(folder))
        refresh()
        return folder

    yield see
    monkeypatch.undo()
    refresh()


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a distribution by hand: its entry points in one group, and its modules."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, group: str, points: dict[str, str], modules: dict[str, str] | None = None) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-3.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.0\n")
        lines = "".join(f"{point} = {target}\n" for point, target in points.items())
        (info / "entry_points.txt").write_text(f"[dp_flash_attention.{group}]\n{lines}")
        for module, source in (modules or {}).items():
            (tmp_path / f"{module}.py").write_text(source)
        refresh()

    yield write
    monkeypatch.undo()
    refresh()
