"""A third party's mechanism in a real release: found, chosen by name, verified, used, written into the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpfa_core.ledger import Ledger
from dpfa_core.registry import BACKENDS
from dpfa_verification.conformance import check_mechanism

attention = pytest.importorskip(
    "dpfa_attention", reason="dpfa-attention is not installed: a release needs it", exc_type=ModuleNotFoundError
)


def release(ledger: Ledger, **choice: str) -> tuple[torch.Tensor, object]:
    q, k, v = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    return attention.dp_flash_attn_func(
        q, k, v, epsilon=1.0, delta=1e-5, ledger=ledger, return_privacy_stats=True, **choice
    )


def test_a_verified_third_party_mechanism_noises_a_release(use: Callable[[str], Path]) -> None:
    use("power_of_two")
    assert check_mechanism("power_of_two", level="quick").ok
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    out, stats = release(ledger, mechanism="power_of_two")
    _, ours = release(ledger)
    assert out.shape == (2, 5, 3, 8)
    assert torch.isfinite(out).all()
    assert (stats.privacy_mechanism, stats.noise_multiplier) == ("power_of_two", 4.0)
    assert stats.noise_std > ours.noise_std
    first, second = ledger.releases()
    assert (first.mechanism, first.backend) == ("power_of_two", stats.backend)
    assert ("acme-power-of-two", "2.1") in first.versions
    assert second.mechanism == "gaussian"


def test_a_third_party_backend_runs_only_when_asked_for_by_name(use: Callable[[str], Path]) -> None:
    use("broken")
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    _, stats = release(ledger)
    assert BACKENDS.entry(ours := stats.backend).first_party
    _, stats = release(ledger, backend="reused_noise")
    assert stats.backend == "reused_noise"
    assert [line.backend for line in ledger.releases()] == [ours, "reused_noise"]
