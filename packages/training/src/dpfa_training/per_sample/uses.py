"""What is known of every use of a parameter: where its operands keep the samples, and where notes go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample.samples import Samples

if TYPE_CHECKING:
    from dpfa_training.per_sample.survey import Log
    from dpfa_training.tape import Tape

Key = tuple[str, Any, tuple[int, ...]]
"""A use: label of the parameter (or of what was computed from it), the function, its operands' dimensions."""


class UnknownUse(NotPrivateError):
    """A parameter met a function that has no rule for this; `parameters` are the names it depends on."""

    def __init__(self, parameters: tuple[str, ...], label: str, function: Any, reason: str = "") -> None:
        name = getattr(function, "__name__", str(function))
        super().__init__(
            f"{label!r} must be used by a function that has a rule, got {name}{reason and f' ({reason})'}; freeze "
            "it, or register a rule (dpfa_training.per_sample.register)."
        )
        self.parameters = parameters
        self.use = f"{name} of {label!r}"


@dataclass
class Uses:
    """Shared by all proxies of one recording."""

    layouts: dict[Key, tuple[Samples | None, ...]] = field(default_factory=dict)
    """Found by the survey: for each tensor operand, where it keeps the samples; None for a constant."""
    log: Log | None = None
    """Set while a survey runs."""
    tape: Tape | None = None
    surveyed: frozenset[int] = frozenset()
    """Sizes of one sample's inputs at the survey; `sizes` are those of the forward at hand."""
    sizes: frozenset[int] = frozenset()
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """Makes backward run for inputs that need no gradient."""

    def explains(self, layout: Samples, times: int) -> bool:
        """Whether `times` rows of each sample follow from the inputs' sizes, as at the survey.

        Tokens chosen by content may be as many as some multiple of the samples by chance.
        """
        pairs = [(a, b) for a in self.surveyed for b in self.sizes]
        return any(
            times == seen or any(times * a == seen * b or times - seen == b - a for a, b in pairs)
            for seen in layout.times
        )


def sizes_of(inputs: Any) -> frozenset[int]:
    """Sizes that one sample has in `inputs`: of each dimension but the first, and of the last two together."""
    found: set[int] = set()
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor):
            found.update(leaf.shape[1:])
            if leaf.dim() > 2:
                found.add(leaf.shape[-1] * leaf.shape[-2])
    return frozenset(found)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes matrix products of `x` in; None outside autocast."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
