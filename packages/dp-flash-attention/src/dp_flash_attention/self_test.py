"""A self-test of this installation: known answers, the law of the noise, the ledger."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One check and its outcome."""

    name: str
    ok: bool
    text: str


@dataclass(frozen=True)
class PrivacyCheck:
    """All checks; ``ok`` if every one passed. Printing it gives a line for each."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.text}" for c in self.checks)


def privacy_check() -> PrivacyCheck:
    """Run the self-test; with dpfa-verification installed, its quick conformance suite too.

    A failing or crashing check is a line of the report, not an exception. Seconds.
    """
    probes: tuple[tuple[str, Callable[[], str]], ...] = (
        ("noise bits", _noise_bits),
        ("noise law", _noise_law),
        ("calibration", _calibration),
        ("accounting", _accounting),
        ("ledger", _ledger),
    )
    checks = []
    for name, probe in probes:
        try:
            checks.append(Check(name, True, probe()))
        except Exception as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return PrivacyCheck((*checks, *_conformance()))


class _Failed(Exception):
    """A check's value is wrong."""


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise _Failed(text)


def _noise_bits() -> str:
    import torch

    from dpfa_kernels_torch.noise.chacha import chacha20
    from dpfa_kernels_torch.noise.keystream import keystream
    from dpfa_kernels_torch.noise.philox import philox4x32

    key = torch.arange(32, dtype=torch.uint8).view(torch.int32).to(torch.int64)
    words = [torch.tensor(word) for word in (1, 0x09000000, 0x4A000000, 0)]
    block = chacha20(key, (words[0], words[1], words[2], words[3]))  # RFC 8439, section 2.3.2
    _expect(int(block[0]) == 0xE4E7F110 and int(block[15]) == 0x4E3C50A2, "ChaCha20 misses RFC 8439")
    run = keystream(bytes(range(32)), 1, 1, (0x09000000, 0x4A000000, 0))
    _expect(torch.equal(run.to(torch.int64) & 0xFFFFFFFF, block), "the key stream differs from ChaCha20")
    zero = torch.tensor(0)
    first = int(philox4x32((zero, zero, zero, zero), torch.zeros(2, dtype=torch.int64))[0])
    _expect(first == 0x6627E8D5, "Philox4x32-10 misses Random123's known answer")
    return "ChaCha20 and Philox4x32-10 give their published answers"


def _noise_law() -> str:
    from dpfa_core.selection import select

    # the backend that training takes here, and the one that others are compared with
    names = dict.fromkeys((select("training", None, None).name, "torch"))
    return "; ".join(f"{name}: {_noise_law_of(name)}" for name in names)


def _noise_law_of(name: str) -> str:
    import torch
    from scipy import stats

    from dpfa_core.selection import backend
    from dpfa_kernels_torch.noise.keys import KeySource

    count, std = 200_000, 2.0
    noise = torch.zeros(count)
    backend(name).add_noise_(noise, std, KeySource().key("training"), parameter=0, step=0)
    values = noise.double().numpy() / std
    # Two-sided at 1e-6 each: a sound installation fails once in half a million runs.
    chi = float((values**2).sum())
    low, high = stats.chi2.ppf([0.5e-6, 1 - 0.5e-6], count)
    _expect(low < chi < high, f"the variance of the noise of {name} is {chi / count:.4f} of the planned one")
    p_value = float(stats.kstest(values, "norm").pvalue)
    _expect(p_value > 1e-6, f"the noise of {name} is not Gaussian (Kolmogorov-Smirnov p = {p_value:.2g})")
    return f"{count} fresh training noises: variance {chi / count:.4f} of the planned one, p = {p_value:.2f}"


def _calibration() -> str:
    from dpfa_core.registry import MECHANISMS

    # Analytic Gaussian mechanism, certified in interval arithmetic to ten digits
    for epsilon, delta, exact in ((1.0, 1e-5, 3.7306316349), (8.0, 1e-5, 0.6002290722)):
        found = MECHANISMS.create("gaussian").calibrate(epsilon, delta)
        _expect(exact - 1e-10 <= found <= exact * (1 + 1e-6), f"sigma({epsilon}, {delta}) = {found}")
    return "Gaussian noise multipliers agree with their certified values, rounded up"


def _accounting() -> str:
    from dpfa_core.events import Gaussian, PoissonSampled
    from dpfa_core.spending import spending

    certified = 1.828250  # sigma 1, q 0.01, T 1000, delta 1e-5, by exact convolution
    found = spending(((PoissonSampled(0.01, Gaussian(1.0)), 1000),), 1e-5)
    for name, value in found.by_accountant:
        _expect(value >= certified * (1 - 1e-4), f"{name} gives {value:.5f}, below the certified {certified}")
    _expect(found.epsilon < 1.9, f"the least bound is {found.epsilon:.4f} where {certified} is possible")
    return ", ".join(f"{name} {value:.4f}" for name, value in found.by_accountant) + " for a certified 1.8283"


def _ledger() -> str:
    from dpfa_core.events import Gaussian
    from dpfa_core.ledger import Ledger

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        with Ledger.open(path, unit="sequence", relation="replace", delta=1e-5) as ledger:
            ledger.record(Gaussian(2.0), purpose="check", mechanism="gaussian", backend="torch", count=4)
        with Ledger.read(path) as ledger:
            _expect(list(ledger.events()) == [(Gaussian(2.0), 4)], "a recorded event was not found again")
            # four times sigma 2 is once sigma 1: 4.3771781 at 1e-5
            spent = ledger.spent()
    _expect(math.isclose(spent, 4.3771781, rel_tol=1e-5), f"spent {spent} instead of 4.37718")
    return "a recorded release is found again and priced"


def _conformance() -> tuple[Check, ...]:
    try:
        from dpfa_verification.conformance import verify
    except ImportError:
        return ()
    return tuple(
        Check(f"conformance of {report.name}", report.ok, f"{len(report.obligations)} obligations")
        for report in verify((), "quick")
    )
