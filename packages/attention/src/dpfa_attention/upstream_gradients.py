"""What a backward pass may do at a release: the gradient before it is a function of the private inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dpfa_core.errors import NotPrivateError

UpstreamGradients = Literal["block", "allow"] | None
"""None: a backward that goes on past the release raises. "block": it stops there. "allow": it goes on."""


def released_under(
    rule: UpstreamGradients, release: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]], *inputs: Tensor
) -> tuple[Tensor, Any]:
    """`release` of the `inputs` q, k, v, with the tape that `rule` allows: (out, what else it returns)."""
    if rule == "allow":
        return release(*inputs)
    out, more = release(*(x.detach() for x in inputs))
    return (closed(out, *inputs) if rule is None else out), more


def closed(out: Tensor, *inputs: Tensor) -> Tensor:
    """`out`, with a backward that raises where it would go on to one of `inputs`.

    `out` has no tape of its own. Parameters behind it train as they always do; only a backward that asks for
    the gradient of what lies before the release gets here.
    """
    asks = [x for x in inputs if x.requires_grad]
    if not (torch.is_grad_enabled() and asks):
        return out
    end: Tensor = ReleaseEnd.apply(out, *asks)  # type: ignore[no-untyped-call]
    return end


class ReleaseEnd(torch.autograd.Function):
    """The place where a backward pass has to stop."""

    @staticmethod
    def forward(out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        raise NotPrivateError(
            "a backward pass must stop at the release, got one that goes on to its inputs: gradients of the input "
            "projections, and of all that is before them, are functions of the private records without noise; give "
            'upstream_gradients="block" to train what comes after the release, or "allow" if those gradients stay '
            "inside."
        )
