"""``python -m dpfa_benchmarks.structures``: what the noise structures save for one attention, computed from plans.

Nothing is timed, so the page is a function of the code alone: a test writes it again and compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_flash_attention.numbers import number
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, NoisePlan, PrivacySpec
from dpfa_core.spending import spending
from dpfa_mechanisms.noise_energy import draws, isotropic_energy, noise_energy
from dpfa_mechanisms.row_scales import row_scales
from dpfa_mechanisms.sensitivity import sensitivity

EPSILON, DELTA, CLIP_NORM = 1.0, 1e-6, 1.0

SHAPE = AttentionProblem(
    batch=1,
    q_len=512,
    kv_len=512,
    q_heads=8,
    kv_heads=8,
    head_dim=64,
    causal=True,
    clip_norm=CLIP_NORM,
    logit_bound=1.0,
)
NUMBERS = SHAPE.q_len * SHAPE.q_heads * SHAPE.head_dim
MASKS: dict[str, dict[str, Any]] = {
    "dense": {"causal": False},
    "causal": {"causal": True},
    "window of 64": {"causal": True, "window": (63, 0)},
}


@dataclass(frozen=True)
class Choice:
    """A mechanism with its parameters, and what of the signal it leaves out."""

    title: str
    name: str
    parameters: dict[str, Any]
    bias: str


CHOICES = (
    Choice("`gaussian`", "gaussian", {}, "none"),
    Choice("`low_rank`, rank 16", "low_rank", {"rank": 16}, "what lies off 16 of 64 directions"),
    Choice("`sparse`, sparsity 0.75", "sparse", {"sparsity": 0.75}, "48 of 64 columns are zero"),
    Choice("`block_diagonal`, condition 4", "block_diagonal", {"block_size": 32, "condition": 4.0}, "none"),
    Choice("`attention_aware`", "attention_aware", {}, "none"),
)


def spec_of(queries: str) -> PrivacySpec:
    """The promise: one token, replaced."""
    return PrivacySpec(epsilon=EPSILON, delta=DELTA, unit="token", queries=queries)  # type: ignore[arg-type]


def planned(choice: Choice, spec: PrivacySpec, problem: AttentionProblem) -> tuple[NoisePlan, float, float]:
    """(the plan, its noise multiplier, its epsilon by the least valid bound)."""
    mechanism = MECHANISMS.create(choice.name, **choice.parameters)
    multiplier = mechanism.calibrate(spec.epsilon, spec.delta)
    plan = mechanism.plan(sensitivity(spec, problem, mechanism.norm), (multiplier,), problem)
    return plan, multiplier, spending([(mechanism.event(multiplier), 1)], spec.delta).epsilon


def structure_rows(queries: str) -> list[str]:
    """One line of the table for each structure."""
    spec, rows = spec_of(queries), []
    even = noise_energy(planned(CHOICES[0], spec, SHAPE)[0], SHAPE)
    for choice in CHOICES:
        plan, multiplier, epsilon = planned(choice, spec, SHAPE)
        energy, naive = noise_energy(plan, SHAPE), isotropic_energy(spec, SHAPE, multiplier)
        rows.append(
            f"| {choice.title} | {queries} | {math.sqrt(energy / NUMBERS):.3g} | {energy / naive:.3g} | "
            f"{energy / even:.3g} | {draws(plan, SHAPE)} | {choice.bias} | {number(epsilon, 6)} |"
        )
    return rows


def row_rows() -> list[str]:
    """``attention_aware`` at its optimum: one line for each mask and kind of queries."""
    rows = []
    for title, change in MASKS.items():
        problem = dataclasses.replace(SHAPE, **change)
        for queries in ("public", "private"):
            spec = spec_of(queries)
            even, aware = (planned(choice, spec, problem)[0] for choice in (CHOICES[0], CHOICES[-1]))
            energies = [noise_energy(plan, problem) for plan in (even, aware)]
            naive = isotropic_energy(spec, problem, planned(CHOICES[0], spec, problem)[1])
            gap = row_scales(problem, queries).gap  # type: ignore[arg-type]
            close = "yes" if gap <= 1e-5 else f"within {gap:.1e}"
            rows.append(
                f"| {title} | {queries} | {energies[0] / naive:.3g} | {energies[1] / naive:.3g} | "
                f"{energies[1] / energies[0]:.3g} | {close} |"
            )
    return rows


def page() -> str:
    """The Markdown page."""
    lines = [
        "# Noise structures",
        "",
        f"Computed, not measured: {SHAPE.q_len} tokens, {SHAPE.q_heads} heads of {SHAPE.head_dim} columns, causal, "
        f"clip norm {CLIP_NORM:g}, logit bound {SHAPE.logit_bound:g}, float32; one token at ε = {EPSILON:g}, "
        f"δ = {DELTA:g}. *Std* is the root mean square of the noise over all {NUMBERS} released numbers, beside which "
        f"a number of a clipped row has {CLIP_NORM / math.sqrt(SHAPE.head_dim):g} at most in that mean. *Energy* "
        "is the expected sum of squared noise over the whole output "
        "([P5](../reference/privacy.md#p5-structured-noise)); *of naive* compares it with equal noise at the bound "
        "that holds without looking at the softmax, *of even* with equal noise at the tight bound. A structure that "
        "leaves columns out trades noise for bias; which is better depends on the data and is not in this table.",
        "",
        "| mechanism | queries | std | energy, of naive | energy, of even | draws | bias | ε |",
        "|---|---|---:|---:|---:|---:|---|---:|",
        *structure_rows("public"),
        *structure_rows("private"),
        "",
        "`attention_aware` gives each row the noise that its own mask asks for. *Optimal* says whether the solver's "
        "lower bound confirms that no other choice of rows adds less.",
        "",
        "| mask | queries | even noise, of naive | by rows, of naive | by rows, of even | optimal |",
        "|---|---|---:|---:|---:|---|",
        *row_rows(),
        "",
        "```console",
        "$ python -m dpfa_benchmarks.structures --page docs/benchmarks/structures.md",
        "```",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_benchmarks.structures", description=__doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page there instead of printing it")
    options = parser.parse_args(arguments)
    text = page()
    if options.page:
        options.page.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
