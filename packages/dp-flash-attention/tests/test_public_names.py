"""What ``import dp_flash_attention`` offers and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dp_flash_attention


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", dp_flash_attention.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dp_flash_attention, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dp_flash_attention.nothing


def test_import_is_light():
    code = "import sys, dp_flash_attention; print(*sys.modules)"
    modules = set(run(code).split())
    assert not modules & {"torch", "transformers", "triton", "z3", "sklearn", "matplotlib", "polars"}
    names = "; ".join(f"dp_flash_attention.{name}" for name in dp_flash_attention.__all__)
    modules = set(run(f"import sys, torch, dp_flash_attention; {names}; print(*sys.modules)").split())
    assert not modules & {"transformers", "z3", "sklearn", "matplotlib", "polars"}


def test_cuda_version_never_raises():
    assert dp_flash_attention.cuda_version() is None or isinstance(dp_flash_attention.cuda_version(), str)


def test_privacy_check_passes_and_can_fail(monkeypatch):
    from dp_flash_attention.self_test import PrivacyCheck, privacy_check

    monkeypatch.setattr("dp_flash_attention.self_test._conformance", lambda: ())
    report = privacy_check()
    assert isinstance(report, PrivacyCheck)
    assert report.ok, str(report)
    monkeypatch.setattr("dpfa_kernels_torch.noise.training_noise.add_run_", lambda *a, **k: None)
    broken = privacy_check()
    assert not broken.ok
    assert "FAIL noise law" in str(broken)
