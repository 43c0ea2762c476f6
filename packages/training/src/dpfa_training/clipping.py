"""How much of its gradient a sample may add: a factor for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from dpfa_core.checks import one_of, positive, require

ROUNDING = 1 - 2.0**-21
"""Factors are lowered by more than their own rounding to float32, and that of the products with them, can add."""

SHRINK = 0.01
"""Added to the norm by "automatic" clipping, so that small gradients keep some of their order."""

PIECE = "#"
"""Between a parameter's name and the number of one of its pieces."""


@dataclass(frozen=True)
class Cut:
    """A parameter cut along one axis into pieces that belong to groups of their own (one head each, say)."""

    axis: Literal[0, 1]
    sizes: tuple[int, ...]

    def names(self, parameter: str) -> list[str]:
        """What the pieces are called in ``Clipping.group_of``."""
        return [f"{parameter}{PIECE}{index}" for index in range(len(self.sizes))]


@dataclass(frozen=True)
class Clipping:
    """Thresholds by group of parameters, and the rule that turns a norm into a factor.

    With the rule "abadi" a sample adds c = min(1, C / norm) of its gradient, with "automatic" c = C / (norm +
    0.01). Either way it adds at most C_g to group g, and sqrt(sum_g C_g^2) to all.

    Guarantee: tested (rounding included).
    Source: Abadi et al. 2016; Bu et al. 2023, "Automatic Clipping"; McMahan et al. 2018 (groups).
    """

    thresholds: tuple[float, ...]
    group_of: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Parameter, or piece of one, to group; those not named are in group 0."""
    rule: Literal["abadi", "automatic"] = "abadi"
    cuts: Mapping[str, Cut] = field(default_factory=dict, hash=False)
    """Parameters that belong to several groups."""

    def __post_init__(self) -> None:
        require(bool(self.thresholds), "thresholds must hold at least one number", self.thresholds)
        for threshold in self.thresholds:
            positive("each clip threshold", threshold, finite=self.rule == "automatic")
        one_of("rule", self.rule, ("abadi", "automatic"))
        for name, group in self.group_of.items():
            known = 0 <= group < len(self.thresholds)
            require(known, f"the group of {name!r} must be one of the {len(self.thresholds)} thresholds", group)

    @classmethod
    def flat(cls, max_grad_norm: float) -> Clipping:
        """One norm over all parameters."""
        return cls((max_grad_norm,))

    def group(self, parameter: str) -> int:
        return self.group_of.get(parameter, 0)

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """(groups, B) norms to factors, both float64; 0 for a sample that is not finite in some group."""
        thresholds = torch.tensor(self.thresholds, dtype=norms.dtype, device=norms.device).unsqueeze(1) * ROUNDING
        if self.rule == "automatic":
            factors = thresholds / (norms + SHRINK)
        else:
            factors = (thresholds / norms).clamp(max=1.0)  # a norm of 0 gives 1
        return torch.where(norms.isfinite().all(0), factors, 0.0)
