"""A moving average of the weights: post-processing of noised steps, so it costs no privacy."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """Exponential moving average with bias correction; ``decay`` 0 keeps the last weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.sums = {name: torch.zeros_like(value) for name, value in _trained(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        for name, value in _trained(module).items():
            self.sums[name].lerp_(value, 1 - self.decay)

    @torch.no_grad()
    def store(self, module: nn.Module) -> None:
        """Put the average into the module."""
        if self.steps:
            for name, value in _trained(module).items():
                value.copy_(self.sums[name] / (1 - self.decay**self.steps))

    def state(self) -> dict[str, object]:
        return {"steps": self.steps, "sums": self.sums}

    def load(self, state: dict[str, object]) -> None:
        self.steps, self.sums = state["steps"], state["sums"]  # type: ignore[assignment]


def _trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
