"""A release on the tape and under torch.func: what the operators do, where somebody wants its gradient or maps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpfa_attention import release_op
from dpfa_attention.biases import refuse_gradient
from dpfa_attention.terms import Terms
from dpfa_core.errors import NotPrivateError


def release(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *terms: Any) -> Tensor:
    """Noised attention of q, k, v, on the tape where one of them asks for a gradient."""
    if _off_tape(q, k, v):
        return release_op.release(q, k, v, ticket, *terms)
    out: Tensor = Release.apply(q, k, v, ticket, *terms)  # type: ignore[no-untyped-call]
    return out


def release_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``release``."""
    if _off_tape(dout, q, k, v):
        return release_op.release_backward(dout, q, k, v, *terms)
    grads: tuple[Tensor, Tensor, Tensor] = ReleaseBackward.apply(dout, q, k, v, *terms)  # type: ignore[no-untyped-call]
    return grads


def _off_tape(*tensors: Tensor) -> bool:
    # the compiler cannot trace a function of autograd that nothing asks the gradient of
    return torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


class Release(torch.autograd.Function):
    """Noised attention and its gradient. The noise is additive and has none.

    Guarantee: tested (finite differences in float64 at fixed noise).
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *terms: Any) -> Tensor:
        return release_op.release(q, k, v, ticket, *terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, _, *values = inputs
        ctx.terms, bias = Terms.parted(tuple(values))
        ctx.save_for_backward(q, k, v, *(() if bias is None else (bias,)))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *bias = ctx.saved_tensors
        if bias and ctx.needs_input_grad[-1]:
            refuse_gradient()
        dq, dk, dv = release_backward(dout, q, k, v, *ctx.terms, *bias)
        return (dq, dk, dv, None, *(None for _ in (*ctx.terms, *bias)))

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _mapped_release(release, info, dims, *arguments)


class ReleaseBackward(torch.autograd.Function):
    """The gradient, which has none itself."""

    @staticmethod
    def forward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, Tensor, Tensor]:
        return release_op.release_backward(dout, q, k, v, *terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotPrivateError(
            "a release must be differentiated once, got a request for its second derivative; detach the first one."
        )

    @staticmethod
    def vmap(info: Any, dims: Any, *arguments: Any) -> Any:
        return _mapped_backward(release_backward, info, dims, *arguments)


# torch.vmap: slices become batch rows, each with noise of its own; the ledger is charged as by a loop, because what
# is mapped may be many queries to one record.


@release_op.draw_release.register_vmap
def _(
    info: Any,
    dims: Any,
    drawn: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    copies: int,
    gradients: bool,
    *values: Any,
) -> tuple[Tensor, None]:
    tensors = _merged(info.batch_size, dims[1:4], q, k, v)
    copies, values = copies * info.batch_size, _repeated(info.batch_size, len(tensors[0]), dims[6:], values)
    return release_op.draw_release(drawn, *tensors, copies, gradients, *values), None


@release_op.release.register_vmap
def _(info: Any, dims: Any, *arguments: Any) -> tuple[Tensor, int]:
    return _mapped_release(release_op.release, info, dims, *arguments)


@release_op.release_backward.register_vmap
def _(info: Any, dims: Any, *arguments: Any) -> Any:
    return _mapped_backward(release_op.release_backward, info, dims, *arguments)


def _mapped_release(
    function: Callable[..., Tensor],
    info: Any,
    dims: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ticket: Tensor,
    *values: Any,
) -> tuple[Tensor, int]:
    tensors = _merged(info.batch_size, dims[:3], q, k, v)
    values = _repeated(info.batch_size, len(tensors[0]), dims[4:], values)
    return _apart(info.batch_size, function(*tensors, ticket, *values)), 0


def _mapped_backward(
    function: Callable[..., Any],
    info: Any,
    dims: Any,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
) -> Any:
    tensors = _merged(info.batch_size, dims[:4], dout, q, k, v)
    grads = function(*tensors, *_repeated(info.batch_size, len(tensors[0]), dims[4:], values))
    return tuple(_apart(info.batch_size, grad) for grad in grads), (0, 0, 0)


def _merged(slices: int, dims: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Slices and batch rows in one dimension."""
    return tuple(
        (x.expand(slices, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
        for x, dim in zip(tensors, dims, strict=True)
    )


def _apart(slices: int, x: Tensor) -> Tensor:
    return x.unflatten(0, (slices, -1))


def _repeated(slices: int, rows: int, dims: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Terms and bias of all `rows` batch rows of all slices."""
    terms, bias = Terms.parted(values)
    terms = terms._replace(lengths=tuple(terms.lengths) * slices)
    if bias is None:
        return terms
    dim = dims[-1]
    if dim is not None or len(bias) > 1:
        each = bias.expand(slices, *bias.shape) if dim is None else bias.movedim(dim, 0)
        bias = each.expand(slices, rows // slices, *each.shape[2:]).flatten(0, 1)
    return (*terms, bias)
