"""Rules by layer type, for layers that do not go through torch functions (an extension of their own)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from dpfa_training.tape import Tape

Forward = Callable[..., torch.Tensor]


class Rule(Protocol):
    """A layer's private forward, and the reason why a particular layer cannot have one."""

    def refusal(self, module: Any) -> str:
        """Why this module is not supported; empty if it is."""
        ...

    def forward(self, module: Any, names: dict[str, str], tape: Tape, anchor: torch.Tensor) -> Forward:
        """The forward to use while `tape` is written; `names` maps trainable attributes to parameters."""
        ...


RULES: dict[type[nn.Module], Rule] = {}
"""Exact types only: a subclass may compute something else. Samples in dimension 0."""


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of this layer's exact type, or None."""
    return RULES.get(type(module))
