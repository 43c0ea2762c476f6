"""The cases, by name."""

from __future__ import annotations

from dpfa_benchmarks.case import Case
from dpfa_benchmarks.cases.private_step import PrivateStep
from dpfa_benchmarks.cases.release_call import ReleaseCall
from dpfa_benchmarks.cases.release_noise import ReleaseNoise

CASES: dict[str, Case] = {case.name: case for case in (PrivateStep(), ReleaseCall(), ReleaseNoise())}
