"""What any backend must keep, whatever it offers."""

from __future__ import annotations

from dpfa_core.contracts import OPERATIONS, Backend, CounterLayout
from dpfa_verification.conformance.bench import SILENT, Bench
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.noise import NoiseExamination
from dpfa_verification.conformance.obligation import discharge, holds, obligation
from dpfa_verification.conformance.privatize import PrivatizeExamination
from dpfa_verification.conformance.release import ReleaseExamination
from dpfa_verification.conformance.report import Finding
from dpfa_verification.conformance.training import TrainingExamination


class BackendExamination:
    """The obligations of every backend."""

    def __init__(self, backend: Backend, bench: Bench) -> None:
        self.backend, self.bench = backend, bench

    @obligation("contract", "the plugin contract")
    def contract(self) -> None:
        ops = self.backend.ops
        holds(isinstance(ops, frozenset) and bool(ops), f"ops must be a frozenset, not empty; it is {ops!r}")
        unknown = sorted(ops - set(OPERATIONS))
        holds(not unknown, f"ops must be among {sorted(OPERATIONS)}, got also {unknown}")
        for op in sorted(ops):
            if op != "per_sample":  # which draws no noise
                layout = self.backend.counter_layout(op)
                good = isinstance(layout, CounterLayout)
                holds(good, f"counter_layout({op!r}) must be a CounterLayout, not {layout!r}")
            about = (None, None) if op in ("training", "per_sample") else (self.bench.problem(), SILENT)
            reasons = self.backend.supports(op, *about)
            good = isinstance(reasons, tuple) and all(isinstance(reason, str) and reason for reason in reasons)
            holds(good, f"supports({op!r}, ...) must return a tuple of sentences, not {reasons!r}")
        reasons = self.backend.supports("no such operation", self.bench.problem(), SILENT)
        holds(bool(reasons), "supports() has no reason against an operation that does not exist")


def examine_backend(backend: Backend, bench: Bench, level: Level) -> tuple[Finding, ...]:
    """All findings, for the operations that the backend lists."""
    findings = discharge(BackendExamination(backend, bench))
    if "release" in backend.ops:
        findings += discharge(ReleaseExamination(backend, bench, level))
    if "privatize" in backend.ops:
        findings += discharge(PrivatizeExamination(backend, bench, level))
    for op in ("release", "privatize"):
        # privatize_ is checked to equal release's epilogue: the law of one is the law of the other.
        if op in backend.ops:
            findings += discharge(NoiseExamination(backend, bench, level, op))
            break
    if "training" in backend.ops:
        findings += discharge(TrainingExamination(backend, bench, level))
    return findings
