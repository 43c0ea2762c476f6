"""The step guard: no torch optimiser can change a private parameter without its engine's noise."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpfa_core.errors import NotPrivateError


class Watcher(Protocol):
    """What decides over a step: the engine of the parameters."""

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...]) -> None:
        """Raises where the step must not happen."""
        ...


_ATTRIBUTE = "_dpfa_engine"
_installed = False


def watch(engine: Watcher, parameters: Iterable[torch.Tensor]) -> None:
    """Bind `parameters` to `engine`; every step of every optimiser that holds one asks it first."""
    global _installed
    parameters = list(parameters)
    if any(engine_of_parameter(parameter) is not None for parameter in parameters):
        raise NotPrivateError("the module is private already; detach its engine before making it private again.")
    for parameter in parameters:
        setattr(parameter, _ATTRIBUTE, weakref.ref(engine))
    if not _installed:
        register_optimizer_step_pre_hook(_before_any_step)
        _installed = True


def release(parameters: Iterable[torch.Tensor]) -> None:
    """Unbind `parameters`."""
    for parameter in parameters:
        if hasattr(parameter, _ATTRIBUTE):
            delattr(parameter, _ATTRIBUTE)


def engine_of_parameter(parameter: torch.Tensor) -> Watcher | None:
    """The engine that `parameter` is bound to, or None."""
    reference = getattr(parameter, _ATTRIBUTE, None)
    return None if reference is None else reference()


def _before_any_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    engines = {
        id(engine): engine
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (engine := engine_of_parameter(parameter)) is not None
    }
    for engine in engines.values():
        # torch passes (optimizer, *arguments of step) to its hooks
        rest = tuple(argument for argument in args if argument is not optimizer)
        engine.before_step(optimizer, (*rest, *kwargs.values()))
