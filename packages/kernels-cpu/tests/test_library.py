"""Without its library, or with one of other sources, the backend says so and others serve."""

import ctypes
from types import SimpleNamespace

import pytest

import dpfa_kernels_cpu
from dpfa_core.errors import PluginError
from dpfa_kernels_cpu import CpuBackend
from dpfa_kernels_cpu.library import library


@pytest.fixture
def _fresh():
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_a_library_of_older_sources_is_refused(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace())
    with pytest.raises(PluginError, match="install the package again"):
        library()
    (reason,) = CpuBackend().supports("training", None, None)
    assert "got one without dpfa_best_level" in reason


@pytest.mark.usefixtures("_fresh")
def test_a_library_that_was_not_built_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(dpfa_kernels_cpu, "__path__", [str(tmp_path)])
    (reason,) = CpuBackend().supports("per_sample", None, None)
    assert "got none; install the package with a C++17 compiler" in reason


@pytest.mark.usefixtures("_fresh")
def test_a_library_that_does_not_load_is_told(monkeypatch, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "dpfa_native.so").write_bytes(b"no library")
    monkeypatch.setattr(dpfa_kernels_cpu, "__path__", [str(tmp_path)])
    with pytest.raises(PluginError, match="cannot be loaded"):
        library()
