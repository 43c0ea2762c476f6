"""The clipped gradient sum of one batch, without noise: for tests, never a release."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from dpfa_core.checks import one_of, positive, require
from dpfa_core.selection import backend as load_backend
from dpfa_core.selection import select
from dpfa_training.adaptive_clipping import QuantileClipping
from dpfa_training.clipped_sums import ClippedSums
from dpfa_training.inputs import rows_of
from dpfa_training.plan import Reduction
from dpfa_training.recording import Recording
from dpfa_training.self_check import SAMPLES
from dpfa_training.tape import Tape
from dpfa_training.threshold_groups import checked_choice, clipping_for


def clipped_gradients(
    module: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], torch.Tensor],
    batch: Any,
    *,
    max_grad_norm: float,
    clipping: str | Mapping[str, float] = "flat",
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
        clipping: "flat", "per_layer", "per_head", "automatic", or {parameter or prefix: threshold}.

    Returns: ({parameter name: float32 gradient in its shape}, norms (B,) float64 before clipping).
    """
    choice = checked_choice(clipping)
    require(not isinstance(choice, QuantileClipping), "clipping must stay as it is within a batch", clipping)
    one_of("reduction", reduction, ("mean", "sum"))
    positive("max_grad_norm", max_grad_norm, finite=False)
    limits = clipping_for(choice, max_grad_norm, module)
    recording = Recording(module)
    kernels = load_backend(select("training", None, None, backend).name)
    found: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    clipped_sums = ClippedSums(kernels, limits)

    def finish(tape: Tape) -> None:
        sums: dict[str, torch.Tensor] = {}
        ones = torch.ones(tape.rows)
        norms = clipped_sums.add(tape, sums, weights=ones, scale=1.0)
        found.append((sums, norms.square().sum(0).sqrt()))

    rows = rows_of(batch, {})
    if rows == 0:
        nothing = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in recording.parameters.items()}
        return nothing, torch.zeros(0, dtype=torch.float64)
    _survey(recording, per_sample_loss, batch, rows)
    tape = Tape(rows, finish)
    clipped_sums.form_during(tape)
    with recording.to(tape, batch), torch.enable_grad():
        losses = per_sample_loss(module, batch)
        require(losses.shape == (rows,), f"per_sample_loss must return shape ({rows},)", tuple(losses.shape))
        tape.watch(losses)
    try:
        losses.sum().backward()  # type: ignore[no-untyped-call]
    except BaseException:
        tape.give_up()
        raise
    sums, norms = found[0]
    divisor = rows if reduction == "mean" else 1
    shapes = {name: parameter.shape for name, parameter in recording.parameters.items()}
    return {name: sums[name].reshape(shape) / divisor for name, shape in shapes.items() if name in sums}, norms


def _survey(recording: Recording, per_sample_loss: Any, batch: Any, rows: int) -> None:
    def forward(picked: list[int]) -> torch.Tensor:
        def cut(item: Any) -> Any:
            batched = isinstance(item, torch.Tensor) and item.dim() > 0 and item.shape[0] == rows
            return item.detach()[picked] if batched else item

        return per_sample_loss(recording.module, torch.utils._pytree.tree_map(cut, batch))  # type: ignore[no-any-return]

    modes = [(layer, layer.training) for layer in recording.module.modules()]
    devices = {parameter.device.type for parameter in recording.parameters.values()}
    try:
        recording.module.eval()
        with torch.random.fork_rng(devices=[]), ExitStack() as exact:
            for device in devices:
                exact.enter_context(torch.autocast(device, enabled=False))
            recording.survey(forward, min(rows, SAMPLES), batch)
    finally:
        for layer, mode in modes:
            layer.training = mode
