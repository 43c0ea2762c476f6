"""Inputs, a backend that watches, and third-party mechanisms made on the spot."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import pricing
from dpfa_core import selection
from dpfa_core.ledger import Ledger
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan

ALPHA = 1e-6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Random q [B, S, H, D] and k, v [B, Sk, Hk, D]."""

    def make(
        B: int = 2,
        S: int = 9,
        H: int = 4,
        D: int = 8,
        *,
        Sk: int | None = None,
        Hk: int | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(B, S, H, D), *2 * [(B, Sk or S, Hk or H, D)]]
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
        return q, k, v

    return make


@pytest.fixture
def ledger() -> Ledger:
    return Ledger.memory(unit="sequence", relation="replace", delta=1e-5)


class Watched:
    """The backend that releases take here; `before` runs ahead of each release."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls, self.plans = inner, 0, []
        self.before: Callable[[], None] = lambda: None

    def release(self, q: Tensor, k: Tensor, v: Tensor, problem: Any, plan: Any, *rest: Any, **more: Any) -> Any:
        self.calls += 1
        self.plans.append(plan)
        self.before()
        return self.inner.release(q, k, v, problem, plan, *rest, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def releasing() -> str:
    """The backend that "auto" takes for releases here: with the native kernels "cpu", without them "torch"."""
    problem = AttentionProblem(batch=1, q_len=1, kv_len=1, q_heads=1, kv_heads=1, head_dim=1)
    silent = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,))
    return selection.select("release", problem, silent).name


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, releasing: str) -> Watched:
    spy = Watched(selection.backend(releasing))
    for name in ("cpu", "torch"):
        monkeypatch.setitem(selection._instances, name, spy)
    return spy


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Install a distribution "somebodys-noise" with one mechanism: (name, source of class Plugin)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, source: str) -> None:
        info = tmp_path / "somebodys_noise-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-noise\nVersion: 1.2\n")
        points = f"[dp_flash_attention.mechanisms]\n{name} = somebodys_noise:Plugin\n"
        (info / "entry_points.txt").write_text(points)
        (tmp_path / "somebodys_noise.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        MECHANISMS.refresh()

    yield install
    sys.modules.pop("somebodys_noise", None)
    MECHANISMS.refresh()
    pricing.priced_release.cache_clear()
    pricing.noiseless_release.cache_clear()
