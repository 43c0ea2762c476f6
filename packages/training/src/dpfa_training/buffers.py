"""Buffers of the private module: what a forward writes there leaves with the weights, without noise."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from dpfa_core.errors import NotPrivateError


class Buffers:
    """Watches the buffers that a state dict holds.

    Counters (one whole number) may move, and buffers of parametrizations, which follow the weights.
    """

    def __init__(self, module: nn.Module) -> None:
        lists = [layer for layer in module.modules() if isinstance(layer, ParametrizationList)]
        of_weights = {id(inner) for one in lists for inner in one.modules()}
        self._watched = [
            (f"{path}.{name}" if path else name, layer, name)
            for path, layer in module.named_modules()
            for name, buffer in layer._buffers.items()
            if buffer is not None and name not in layer._non_persistent_buffers_set and id(layer) not in of_weights
            if buffer.is_floating_point() or buffer.numel() > 1
        ]
        self._before: list[torch.Tensor] = []

    def begin(self) -> None:
        """A forward in train() mode begins."""
        # by content: writing to `.data` moves no version
        self._before = [layer._buffers[name].detach().clone() for _, layer, name in self._watched]  # type: ignore[union-attr]

    def check(self) -> None:
        """It is over: puts back what it has changed.

        Raises: NotPrivateError naming the first buffer.
        """
        before, self._before = self._before, []
        changed = []
        for (path, layer, name), old in zip(self._watched, before, strict=False):
            new = layer._buffers.get(name)
            if new is None or new.shape != old.shape or not torch.equal(new, old):
                layer._buffers[name] = old
                changed.append(path)
        if changed:
            raise NotPrivateError(
                f"a forward must not write into buffers, which leave with the weights and get no noise, got {changed}: "
                "statistics of the data, such as running means, would be given away. Leave them out "
                "(track_running_stats=False), freeze them (eval() of that layer), or register them with "
                "persistent=False where they do not depend on the data."
            )
