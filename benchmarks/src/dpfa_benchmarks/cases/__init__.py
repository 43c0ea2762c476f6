"""The cases, by name."""

from __future__ import annotations

from dpfa_benchmarks.case import Case
from dpfa_benchmarks.cases.private_step import PrivateStep
from dpfa_benchmarks.cases.release_call import ReleaseCall

CASES: dict[str, Case] = {case.name: case for case in (PrivateStep(), ReleaseCall())}
