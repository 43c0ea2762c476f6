"""A release on the tape: the backend's forward and backward, nothing of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from dpfa_attention.structure_tensors import structure_tensors
from dpfa_core.contracts import Backend, NoiseKey
from dpfa_core.spec import AttentionProblem, NoisePlan


def release(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: AttentionProblem,
    plan: NoisePlan,
    key: NoiseKey,
    backend: Backend,
    softmax_scale: float,
) -> Tensor:
    """Noised attention of q, k, v, on the tape where one of them asks for a gradient."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = Release.apply(q, k, v, problem, plan, key, backend, softmax_scale)[0]  # type: ignore[no-untyped-call]
        return out
    return Release.forward(q, k, v, problem, plan, key, backend, softmax_scale)[0]


class Release(torch.autograd.Function):
    """The backend's release and its backward. The noise is additive and has no gradient.

    Guarantee: tested (finite differences in float64 at fixed noise).
    """

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: AttentionProblem,
        plan: NoisePlan,
        key: NoiseKey,
        backend: Backend,
        softmax_scale: float,
    ) -> tuple[Tensor, Any]:
        tensors = structure_tensors(plan, problem, q.device)
        return backend.release(q, k, v, problem, plan, tensors, key, softmax_scale=softmax_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        leaves, ctx.structure = pytree.tree_flatten(output[1])
        # Tensors go through the tape, which notices when one is changed in place before the backward.
        ctx.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaves[place] for place in ctx.places))
        for place in ctx.places:
            leaves[place] = None
        ctx.leaves, ctx.backend = leaves, inputs[6]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        leaves = list(ctx.leaves)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            leaves[place] = tensor
        saved = pytree.tree_unflatten(leaves, ctx.structure)
        return (*ctx.backend.release_backward(dout, saved), None, None, None, None, None)
