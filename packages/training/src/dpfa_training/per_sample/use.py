"""One call of a function on parameters and tensors of the batch, and the table of rules for such calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpfa_training.per_sample.samples import Samples
from dpfa_training.per_sample.uses import UnknownUse, Uses

Rule = Callable[..., Any]
"""rule(use, *args, **kwargs): what the function returns, noting the per-sample gradients in its backward."""

FUNCTIONS: dict[Any, Rule] = {}
"""torch function to rule; see ``register``."""

CONSTANT: dict[Any, Rule] = {}
"""Rules for functions of proxies and constants, where the generic way would be wasteful."""


def register(*functions: Any) -> Callable[[Rule], Rule]:
    """Make the decorated rule that of `functions`: the objects that ``__torch_function__`` is given.

    The rule is called as ``rule(use, *args, **kwargs)``; the parameters among the arguments are proxies.
    It must return what the function returns, and see to it that backward calls ``proxy.note`` once.
    """

    def enter(rule: Rule) -> Rule:
        FUNCTIONS.update(dict.fromkeys(functions, rule))
        return rule

    return enter


class Use:
    """One call of a function on proxies and tensors of the batch."""

    __slots__ = ("function", "layouts", "plain", "proxies", "rows", "uses")

    def __init__(self, function: Any, proxies: list[Any], plain: list[Tensor], layouts: Any, rows: int) -> None:
        self.function, self.proxies, self.plain, self.layouts, self.rows = function, proxies, plain, layouts, rows
        self.uses: Uses = proxies[0].uses

    def samples(self, x: Tensor) -> Samples | None:
        """Where the operand `x` keeps the samples; None for a constant."""
        for one, layout in zip(self.plain, self.layouts, strict=True):
            if one is x:
                return layout  # type: ignore[no-any-return]
        raise self.unknown("an operand that is not its own")

    def unknown(self, reason: str = "") -> UnknownUse:
        """The error to raise where the rule cannot do this call."""
        first = self.proxies[0]
        names = tuple(dict.fromkeys(name for proxy in self.proxies for name in proxy.parameters))
        return UnknownUse(names, first.label, self.function, reason)

    def copies(self, proxy: Any) -> Tensor:
        """(B, *shape): a copy for each sample, whose gradient is the sample's own."""
        return _Copies.apply(proxy.value, self.uses.anchor, proxy, self.rows)  # type: ignore[no-any-return, no-untyped-call]


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, proxy: Any, rows: int) -> Tensor:
        ctx.proxy = proxy
        return value.expand(rows, *value.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.proxy.note("bare", grad.to(torch.promote_types(grad.dtype, torch.float32)))
        return None, None, None, None
