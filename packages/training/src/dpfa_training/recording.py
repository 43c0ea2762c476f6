"""Recording a forward pass: known layers compute by their rules, bare parameters become per-sample copies.

Nothing is installed on the model except while a recorded forward runs, so copies of the model, its
state dict and its evaluation are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample import bare, rule_for
from dpfa_training.tape import Tape


class Recording:
    """Which layers of `module` are recorded and under which parameter names.

    Raises: NotPrivateError naming the first trainable parameter or layer that cannot be covered.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        if rule_for(module) is not None:
            raise NotPrivateError(
                f"the module must contain its layers, got a single {type(module).__name__}; wrap it in nn.Sequential."
            )
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise NotPrivateError("nothing to train: no parameter has requires_grad=True; unfreeze some.")
        for name, parameter in self.parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise NotPrivateError(
                    f"parameter {name!r} must be float32, got {parameter.dtype}; call module.float()."
                )
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._layers: list[tuple[nn.Module, dict[str, str]]] = []
        self._bare: list[tuple[nn.Module, str, str]] = []
        for path, layer in module.named_modules():
            self._cover(path, layer)

    def _cover(self, path: str, layer: nn.Module) -> None:
        kind = type(layer).__name__
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise NotPrivateError(
                f"{path or 'the module'} is a {kind}, which couples the samples of a batch; use LayerNorm or GroupNorm."
            )
        if hasattr(layer, "_orig_mod"):
            raise NotPrivateError(
                f"{path or 'the module'} is compiled, which this version does not offer; pass the module "
                "as it was before torch.compile."
            )
        own = {
            attribute: self._names[id(parameter)]
            for attribute, parameter in layer._parameters.items()
            if parameter is not None and id(parameter) in self._names
        }
        if not own:
            return
        rule = rule_for(layer)
        if rule is not None:
            reason = rule.refusal(layer)
            if reason:
                raise NotPrivateError(f"{path!r} ({kind}) cannot be trained privately: {reason}.")
            self._layers.append((layer, own))
            return
        for attribute, name in own.items():
            reason = bare.refusal(layer._parameters[attribute])  # type: ignore[arg-type]
            if reason:
                raise NotPrivateError(f"{name!r} of {kind} cannot be trained privately: {reason}.")
            self._bare.append((layer, attribute, name))

    def start(self, tape: Tape) -> None:
        """From now on, forwards write to `tape`; ``stop`` ends it."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotPrivateError("autocast is not offered by this version; leave the autocast context.")
        anchor = torch.zeros((), requires_grad=True)
        for layer, names in self._layers:
            rule = rule_for(layer)
            assert rule is not None  # noqa: S101  (checked when the recording was built)
            layer.__dict__["forward"] = rule.forward(layer, names, tape, anchor)
        for owner, attribute, name in self._bare:
            copies = bare.per_sample_copy(self.parameters[name], name, tape, anchor)
            owner._parameters[attribute] = copies  # type: ignore[assignment]

    def stop(self) -> None:
        """Put every layer and parameter back."""
        for layer, _ in self._layers:
            layer.__dict__.pop("forward", None)
        for owner, attribute, name in self._bare:
            owner._parameters[attribute] = self.parameters[name]  # type: ignore[assignment]

    @contextmanager
    def to(self, tape: Tape) -> Iterator[None]:
        """``start`` and ``stop`` around a block."""
        self.start(tape)
        try:
            yield
        finally:
            self.stop()
