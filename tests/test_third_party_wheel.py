"""Noise of somebody else: a wheel is built and installed, and a module uses it by the name of its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "acme-laplacian"
    version = "4.2"

    [project.entry-points."dp_flash_attention.mechanisms"]
    acme_laplacian = "acme_laplacian:Priced"
    acme_silent = "acme_laplacian:Silent"
"""

SOURCE = """
    import torch

    from dp_flash_attention.mechanisms import DPMechanism
    from dpfa_core.events import Laplace


    class Silent(DPMechanism):
        norm = "l1"

        def add_noise(self, tensor, sensitivity, epsilon):
            scale = sensitivity / epsilon
            return tensor + torch.distributions.Laplace(0, scale).sample(tensor.shape)


    class Priced(Silent):
        def dp_event(self, sensitivity, epsilon, delta):
            return Laplace(1.0 / epsilon)
"""

USE = """
    import json

    import torch

    from dp_flash_attention import DPFlashAttention, Ledger
    from dpfa_core.registry import MECHANISMS

    ledger, found = Ledger.memory(delta=1e-5), {}
    for name in ("acme_laplacian", "acme_silent"):
        module = DPFlashAttention(16, 2, 0.5, noise_mechanism=name, ledger=ledger)
        out, stats = module(torch.randn(2, 4, 16), return_privacy_stats=True)
        line = list(ledger.releases())[-1]
        found[name] = [
            bool(out.isfinite().all()), stats.epsilon_spent, stats.privacy_mechanism, line.mechanism, line.purpose,
            module.get_privacy_spent()["total_epsilon"], list(map(list, line.versions)),
        ]
    entry = MECHANISMS.entry("acme_laplacian")
    found["entry"] = [entry.distribution, entry.version, entry.first_party]
    print(json.dumps(found))
"""


def pip(*arguments: str | Path) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", arguments[0], *options, *map(str, arguments[1:])], check=True)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder that the wheel is installed in."""
    source, wheels, target = (tmp_path / name for name in ("source", "wheels", "installed"))
    package = source / "src" / "acme_laplacian"
    package.mkdir(parents=True)
    (source / "pyproject.toml").write_text(textwrap.dedent(PROJECT))
    (package / "__init__.py").write_text(textwrap.dedent(SOURCE))
    pip("wheel", "--no-build-isolation", "--wheel-dir", wheels, source)
    (wheel,) = wheels.iterdir()
    pip("install", "--target", target, wheel)
    return target


def test_a_module_uses_the_noise_of_an_installed_wheel_and_prices_it_by_what_it_says(installed: Path) -> None:
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["entry"] == ["acme-laplacian", "4.2", False]
    finite, epsilon, *names, purpose, total, versions = found["acme_laplacian"]
    assert finite
    assert names == ["acme_laplacian"] * 2
    assert purpose == "release; noise by a mechanism that nobody checked"
    assert 0.49 < epsilon <= 0.5
    assert 0.49 < total <= 0.5 * (1 + 1e-4)
    assert ["acme-laplacian", "4.2"] in versions
    # one that says nothing of its price is not called private
    assert found["acme_silent"][1] == found["acme_silent"][5] == float("inf")
