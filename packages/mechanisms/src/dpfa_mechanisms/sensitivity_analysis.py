"""The sensitivity of a release, head by head and component by component."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfa_core.spec import AttentionProblem, Norm, PrivacySpec


class AttentionSensitivityAnalyzer:
    """How far one record moves the released attention, per head and in all.

    Guarantee: as of ``dpfa_mechanisms.sensitivity``; nothing is estimated from data.
    """

    def __init__(self, spec: PrivacySpec, problem: AttentionProblem, *, norm: Norm = "l2") -> None:
        self._spec, self._problem, self._norm = spec, problem, norm

    def analyze(self) -> dict[str, Any]:
        """Bounds in output units, ready for JSON.

        ``tight`` scales the noise, ``naive`` looks at no softmax, ``ratio`` is naive / tight. ``per_head`` has one
        entry for each query head, with the head of keys and values that it reads. An entry says what the head would
        need if it were released alone, and how far one of its rows moves at most: ``query``, ``key`` and ``value``, if
        only that part of the record changes; for the token unit also ``key_value`` and ``query_key_value``, if they
        change together. ``sentences`` say why.

        Raises: PrivacyParameterError where there is no sensitivity.
        """
        # imported here, so that naming this class costs no numpy
        from dpfa_mechanisms.component_bounds import component_bounds
        from dpfa_mechanisms.explain import explain

        whole = explain(self._spec, self._problem, self._norm)
        alone = dataclasses.replace(self._problem, q_heads=1, kv_heads=1)
        head = explain(self._spec, alone, self._norm)
        entry: dict[str, Any] = {"tight": head.tight, "naive": head.naive, "ratio": _ratio(head.naive, head.tight)}
        parts = [component_bounds(self._spec, alone, self._norm, row.visible_keys) for row in head.rows]
        entry |= {name: max(getattr(part, name) for part in parts) for name in ("query", "key", "value")}
        if self._spec.unit == "token":
            entry["key_value"] = max(row.if_seen for row in head.rows)
            entry["query_key_value"] = max(row.if_own for row in head.rows)
        group = self._problem.q_heads // self._problem.kv_heads
        return {
            "norm": self._norm,
            "item": whole.item,
            "tight": whole.tight,
            "naive": whole.naive,
            "ratio": _ratio(whole.naive, whole.tight),
            "worst_key": whole.worst_key,
            "per_head": [{"head": i, "kv_head": i // group, **entry} for i in range(self._problem.q_heads)],
            "sentences": list(whole.sentences),
        }


def _ratio(naive: float, tight: float) -> float:
    return naive / tight if tight > 0 else 1.0
