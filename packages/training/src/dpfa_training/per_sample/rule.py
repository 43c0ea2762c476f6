"""The table of rules, by exact layer type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from dpfa_training.per_sample import conv2d, embedding, layer_norm, linear
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


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear.LinearRule(),
    nn.Embedding: embedding.EmbeddingRule(),
    nn.LayerNorm: layer_norm.LayerNormRule(),
    nn.Conv2d: conv2d.PatchRule(),
}
"""Exact types only: a subclass may compute something else. Add a rule for a layer of your own here."""


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of this layer's exact type, or None."""
    return RULES.get(type(module))
