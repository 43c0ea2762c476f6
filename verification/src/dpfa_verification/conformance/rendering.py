"""A report as text."""

from __future__ import annotations

from dpfa_verification.conformance.report import Report

WORDS = {"failed": "FAILED", "assumed": "assumed", "tested": "tested", "proved": "proved"}


def render(report: Report) -> str:
    """One line for each obligation, with the counterexample or the reason below what was not tested."""
    lines = [f"{'ok' if report.ok else 'FAILED'}: {report.kind} {report.name}, {report.origin}"]
    for claim, verdict, text in report.obligations:
        lines.append(f"  {WORDS[verdict]:8} {claim.obligation:26} {claim.source}".rstrip())
        lines += [f"           {line}" for line in text.splitlines()]
    return "\n".join(lines)
