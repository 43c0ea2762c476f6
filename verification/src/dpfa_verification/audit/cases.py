"""Releases worth attacking, and the distances that are claimed for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec, Relation, Unit
from dpfa_mechanisms.sensitivity import sensitivity

SHAPE: dict[str, Any] = {
    "batch": 1,
    "q_len": 8,
    "kv_len": 8,
    "q_heads": 2,
    "kv_heads": 2,
    "head_dim": 8,
    "clip_norm": 1.5,
    "logit_bound": 1.0,
    "dtype": "float64",
}

MASKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "window of 3": {"causal": True, "window": (2, 0)},
    "window to both sides": {"window": (2, 1)},
    "grouped heads": {"q_heads": 4},
    "one key head, causal": {"q_heads": 4, "kv_heads": 1, "causal": True},
    "3 queries of 8 keys": {"q_len": 3, "causal": True},
    "logit bound 2": {"logit_bound": 2.0},
}


@dataclass(frozen=True)
class Case:
    """A release, and whether its claim is known to be reached."""

    title: str
    spec: PrivacySpec
    problem: AttentionProblem
    norm: Norm = "l2"
    attained: bool = True

    @property
    def claim(self) -> float:
        """The sensitivity that noise is scaled by."""
        return sensitivity(self.spec, self.problem, self.norm).value


def spec_of(unit: Unit, queries: Any = None, relation: Relation = "replace", epsilon: float = 1.0) -> PrivacySpec:
    """A promise at delta = 1e-5."""
    return PrivacySpec(epsilon=epsilon, delta=1e-5, unit=unit, relation=relation, queries=queries)


def problem_of(**fields: Any) -> AttentionProblem:
    """The shape of the cases with some fields changed."""
    return AttentionProblem(**SHAPE | fields)


def token_cases() -> list[Case]:
    """Public queries reach their bound; private ones are bounded, and how near they come is reported."""
    found = []
    for queries in ("public", "private"):
        spec, public = spec_of("token", queries), queries == "public"
        found += [
            Case(f"{title}, {queries} queries", spec, problem_of(**fields), attained=public)
            for title, fields in MASKS.items()
        ]
        found.append(Case(f"dense, l1, {queries} queries", spec, problem_of(), "l1", attained=public))
    emptied = spec_of("token", "public", "add_or_remove")
    # an emptied slot keeps a weight, so the bound of a replaced token is not reached
    return [*found, Case("dense, public queries, an emptied slot", emptied, problem_of(), attained=False)]


def sequence_cases() -> list[Case]:
    """Both relations, clips and norms."""
    return [
        Case(f"{title}, {clip} clip, {relation}, {norm}", spec_of("sequence", None, relation), problem, norm)
        for relation in ("replace", "add_or_remove")
        for title, clip, norm, problem in (
            ("dense", "value", "l2", problem_of(clip="value")),
            ("dense", "output", "l2", problem_of(clip="output")),
            ("dense, no logit bound", "value", "l1", problem_of(clip="value", logit_bound=None)),
            ("causal, grouped heads", "output", "l1", problem_of(clip="output", causal=True, q_heads=4)),
            ("causal, 8 queries of 5 keys", "value", "l2", problem_of(kv_len=5, causal=True)),
        )
    ]  # type: ignore[misc]
