"""The plain definition: autograd on one sample at a time, clipped and summed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpfa_benchmarks.case import Step
from dpfa_benchmarks.workloads import Workload

Gradients = dict[str, Tensor]
PIECE = 1 << 18
"""Numbers whose squares are added up in float32."""


def build(work: Workload, *, noise_multiplier: float, max_grad_norm: float, lr: float) -> Step:
    """The step that a careful user writes: sums and noise in memory that is kept, gradients added in place."""
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    sums = zeros(model)
    noise = {name: torch.empty_like(total) for name, total in sums.items()}
    parameters = dict(model.named_parameters())

    def step() -> None:
        add_clipped(model, work, max_grad_norm, sums)
        for name, total in sums.items():
            total.add_(noise[name].normal_(), alpha=noise_multiplier * max_grad_norm).div_(len(work.labels))
            parameters[name].grad = total
        optimizer.step()
        for total in sums.values():
            total.zero_()

    return step


def zeros(model: nn.Module) -> Gradients:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}


def add_clipped(model: nn.Module, work: Workload, max_grad_norm: float, sums: Gradients) -> None:
    """Add each sample's gradient, scaled to a norm of at most `max_grad_norm`, to `sums`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index in range(len(work.labels)):
        row = slice(index, index + 1)
        loss = work.losses(model(work.inputs[row]), work.labels[row]).sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = l2_norm(gradients)
        factor = min(1.0, max_grad_norm / norm) if norm else 1.0
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.add_(gradient, alpha=factor)


def l2_norm(gradients: Iterable[Tensor]) -> float:
    """Joint l2 norm. ``torch.linalg.vector_norm`` adds up one long row: 1.6e-4 too little for 3 million float32."""
    pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(PIECE)]
    return float(torch.stack([torch.dot(piece, piece) for piece in pieces]).double().sum().sqrt())


def clipped_sum(model: nn.Module, work: Workload, max_grad_norm: float) -> Gradients:
    """Sum over the batch of each sample's clipped gradient."""
    sums = zeros(model)
    add_clipped(model, work, max_grad_norm, sums)
    return sums


def truth(work: Workload, max_grad_norm: float) -> Gradients:
    """The same in float64."""
    inputs = work.inputs.double() if work.inputs.is_floating_point() else work.inputs
    return clipped_sum(work.model().double(), replace(work, inputs=inputs), max_grad_norm)


def relative_error(found: Gradients, exact: Gradients) -> float:
    """l2 distance over all parameters together, relative to the exact gradient.

    Raises: ValueError if the parameters differ.
    """
    if set(found) != set(exact):
        raise ValueError(f"gradients of different parameters: {sorted(set(found) ^ set(exact))}.")
    difference = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    whole = sum(float(gradient.square().sum()) for gradient in exact.values())
    return float((difference / whole) ** 0.5)
