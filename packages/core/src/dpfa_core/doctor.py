"""What is installed, what is broken, and which backend would run: guarded probes, torch not needed."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import dpfa_core
from dpfa_core.registry import ACCOUNTANTS, BACKENDS, FIRST_PARTY, MECHANISMS, Registry
from dpfa_core.selection import select
from dpfa_core.spec import CONTRACT_VERSION, AttentionProblem, NoisePlan

PACKAGES = ("dpfa-core", *sorted(FIRST_PARTY), "dpfa-attention", "dpfa-training", "dp-flash-attention")


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    subject: str
    ok: bool
    text: str


def examine() -> tuple[Finding, ...]:
    """Look at versions, plugins and the backend selection; a failing probe is a finding, not an error."""
    probes: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("machine", _machine),
        ("packages", _packages),
        ("plugins", _plugins),
        ("selection", _selection),
    )
    findings: list[Finding] = []
    for name, probe in probes:
        try:
            findings += probe()
        except Exception as error:
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    return tuple(findings)


def main(arguments: list[str]) -> int:
    """``python -m dpfa_core doctor [--json]``: 0 if everything found works, 1 otherwise, 2 for bad usage."""
    if [argument for argument in arguments if argument != "--json"] != ["doctor"]:
        sys.stderr.write("usage: python -m dpfa_core doctor [--json]\n")
        return 2
    findings = examine()
    if "--json" in arguments:
        report = {
            "ok": all(found.ok for found in findings),
            "findings": [asdict(found) for found in findings],
        }
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        for finding in findings:
            sys.stdout.write(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject}: {finding.text}\n")
    return 0 if all(finding.ok for finding in findings) else 1


def _machine() -> list[Finding]:
    cores = os.cpu_count()
    return [
        Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} at {sys.executable}"),
        Finding("system", True, f"{platform.system()} {platform.machine()}, {cores} cores"),
        Finding("sqlite", True, sqlite3.sqlite_version),
        Finding("contract", True, f"version {CONTRACT_VERSION}"),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name in (*PACKAGES, "torch"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, True, "not installed"))
            continue
        same = name == "torch" or version.split(".")[:2] == dpfa_core.__version__.split(".")[:2]
        hint = "" if same else f", but dpfa-core is {dpfa_core.__version__}: install the same minor version"
        findings.append(Finding(name, same, version + hint))
    return findings


def _plugins() -> list[Finding]:
    kinds = (("mechanism", MECHANISMS), ("accountant", ACCOUNTANTS), ("backend", BACKENDS))
    return [finding for kind, registry in kinds for finding in _registry(kind, registry)]


def _registry(kind: str, registry: Registry) -> list[Finding]:
    findings = []
    for entry in registry.entries():
        party = "" if entry.first_party else ", third party"
        try:
            registry.load(entry.name)
            findings.append(Finding(f"{kind} {entry.name}", True, entry.origin + party))
        except Exception as error:
            findings.append(Finding(f"{kind} {entry.name}", False, str(error)))
    return findings


def _selection() -> list[Finding]:
    problem = AttentionProblem(batch=1, q_len=16, kv_len=16, q_heads=2, kv_heads=2, head_dim=16, clip_norm=1.0)
    plan: Any = NoisePlan(mechanism="gaussian", distribution="gaussian", head_scale=(1.0,), transform="bm64")
    if not BACKENDS.entries():
        return [Finding("selection", True, "no backend installed: pip install dpfa-kernels-torch")]
    chosen = select("release", problem, plan)
    trace = "; ".join(f"{name}: {', '.join(reasons) or 'can run it'}" for name, reasons in chosen.trace)
    return [Finding("selection", True, f"release on cpu in float32 -> {chosen.name} ({trace})")]
