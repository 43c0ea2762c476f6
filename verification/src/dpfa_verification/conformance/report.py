"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpfa_core.spec import Claim, Guarantee

Verdict = Guarantee | Literal["failed"]
Finding = tuple[Claim, Verdict, str]
"""An obligation, what the suite says of it, and the counterexample or the reason why nothing was decided."""


@dataclass(frozen=True)
class Report:
    """The obligations of one plugin; `ok` unless one of them failed.

    "tested" means that the suite looked for a counterexample and found none, "assumed" that it did not look.
    """

    ok: bool
    obligations: tuple[Finding, ...]
    name: str = ""
    kind: str = ""
    """mechanism, accountant or backend."""
    origin: str = ""
    """Distribution, version and target."""

    def failed(self) -> tuple[str, ...]:
        """Names of the obligations that failed."""
        return tuple(claim.obligation for claim, verdict, _ in self.obligations if verdict == "failed")

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "origin": self.origin,
            "ok": self.ok,
            "obligations": [
                {"claim": claim.to_json(), "verdict": verdict, "counterexample": text}
                for claim, verdict, text in self.obligations
            ],
        }
