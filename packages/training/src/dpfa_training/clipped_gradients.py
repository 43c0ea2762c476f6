"""The clipped gradient sum of one batch, without noise: for tests, never a release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpfa_core.checks import one_of, positive, require
from dpfa_core.selection import backend as load_backend
from dpfa_core.selection import select
from dpfa_training.clipping import clipped_sums
from dpfa_training.plan import Reduction
from dpfa_training.recording import Recording
from dpfa_training.tape import Tape


def clipped_gradients(
    module: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], torch.Tensor],
    batch: Any,
    *,
    max_grad_norm: float,
    clipping: str = "flat",
    reduction: Reduction = "sum",
    backend: str = "auto",
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sum (or mean) over the batch of every sample's clipped gradient. No noise: not private.

    Guarantee: tested against one-sample-at-a-time autograd.

    Args:
        module: as for ``make_private``.
        per_sample_loss: (module, batch) to (B,) losses, each a function of its own row only.
        batch: handed to `per_sample_loss`; its first tensor has B rows.
        max_grad_norm: l2 threshold of one sample's whole gradient; ``inf`` clips nothing.

    Returns: ({parameter name: float32 gradient in its shape}, norms (B,) float64 before clipping).
    """
    one_of("clipping", clipping, ("flat",))
    one_of("reduction", reduction, ("mean", "sum"))
    positive("max_grad_norm", max_grad_norm, finite=False)
    recording = Recording(module)
    kernels = load_backend(select("training", None, None, backend).name)
    found: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def finish(tape: Tape) -> None:
        ones = torch.ones(tape.rows)
        found.append(clipped_sums(kernels, tape, weights=ones, max_grad_norm=max_grad_norm, scale=1.0))

    rows = _rows(batch)
    with recording.to(Tape(rows, finish)), torch.enable_grad():
        losses = per_sample_loss(module, batch)
        require(losses.shape == (rows,), f"per_sample_loss must return shape ({rows},)", tuple(losses.shape))
        losses.sum().backward()
    sums, norms = found[0]
    divisor = rows if reduction == "mean" else 1
    shapes = {name: parameter.shape for name, parameter in recording.parameters.items()}
    return {name: sums[name].reshape(shape) / divisor for name, shape in shapes.items() if name in sums}, norms


def _rows(batch: Any) -> int:
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise ValueError("batch must hold a tensor with one row per sample")
