"""The plain definition: autograd on one sample at a time, clipped and summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfa_benchmarks.cases.workload import Workload

Gradients = dict[str, Tensor]


def clipped_sum(model: nn.Module, work: Workload, max_grad_norm: float) -> Gradients:
    """Sum over the batch of each sample's gradient, scaled to a norm of at most `max_grad_norm`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for index in range(len(work.labels)):
        row = slice(index, index + 1)
        loss = F.cross_entropy(model(work.inputs[row]), work.labels[row])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = (max_grad_norm / norm).clamp(max=1.0)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.add_(gradient * factor)
    return sums


def truth(work: Workload, max_grad_norm: float) -> Gradients:
    """The same in float64."""
    inputs = work.inputs.double() if work.inputs.is_floating_point() else work.inputs
    return clipped_sum(work.model().double(), Workload(work.model, inputs, work.labels), max_grad_norm)


def relative_error(found: Gradients, exact: Gradients) -> float:
    """l2 distance over all parameters together, relative to the exact gradient.

    Raises: ValueError if the parameters differ.
    """
    if set(found) != set(exact):
        raise ValueError(f"gradients of different parameters: {sorted(set(found) ^ set(exact))}.")
    difference = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    whole = sum(float(gradient.square().sum()) for gradient in exact.values())
    return float((difference / whole) ** 0.5)
