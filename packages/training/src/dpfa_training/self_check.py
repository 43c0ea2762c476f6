"""Before the first step: does the engine see exactly each sample's own gradient in this very model?

A few samples go through the recorded model together and through the plain model one by one. A layer
whose rule does not fit, samples that influence one another, a loss that is normalised by other samples'
tokens, and a parameter that is never used all show as a difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training.plan import Reduction
from dpfa_training.recording import Recording
from dpfa_training.tape import Tape

SAMPLES = 4
TOO_SMALL, TOO_LARGE = 0.999, 1.25
"""Allowed ratio of the engine's norm bound to the exact norm; it may be large, it may not be small."""


def self_check(recording: Recording, backend: Any, args: Any, kwargs: Any, rows: int, reduction: Reduction) -> int:
    """Compare per-sample gradient norms on up to four samples of a real batch.

    Guarantee: tested (it rejects BatchNorm-like coupling, token-mean losses and wrong rules).
    Returns: how many samples were compared.
    Raises: NotPrivateError naming the parameter, both norms and the remedy.
    """
    samples = min(SAMPLES, rows)
    modes = [(layer, layer.training) for layer in recording.module.modules()]
    squares: dict[str, torch.Tensor] = {}

    def keep(tape: Tape) -> None:
        squares.update({name: backend.sqnorm(note.kind, note.saved) for name, note in tape.merged()})

    try:
        for layer, _ in modes:  # dropout off: the two passes must compute the same function
            layer.training = False
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            together = _rows(args, kwargs, rows, slice(0, samples))
            tape = Tape(samples, keep)
            with recording.to(tape):
                output = recording.module.forward(*together[0], **together[1])
            scalar, leaves = _outputs(output, samples)
            probes = _probes(leaves, scalar)
            torch.autograd.backward(leaves, probes)
            unused = [name for name in recording.parameters if name not in squares]
            if unused:
                raise NotPrivateError(
                    f"every trainable parameter must be used in a forward, got none for {unused}; "
                    "freeze what is not used (requires_grad_(False))."
                )
            scale = samples if scalar and reduction == "mean" else 1
            for index in range(samples):
                alone = _rows(args, kwargs, rows, slice(index, index + 1))
                output = recording.module.forward(*alone[0], **alone[1])
                _, own = _outputs(output, 1)
                cotangents = probes if scalar else [probe[index : index + 1] for probe in probes]
                gradients = torch.autograd.grad(own, list(recording.parameters.values()), cotangents, allow_unused=True)
                exact = {
                    name: 0.0 if gradient is None else float(gradient.double().square().sum())
                    for name, gradient in zip(recording.parameters, gradients, strict=True)
                }
                _compare(index, exact, {name: float(s[index]) * scale**2 for name, s in squares.items()})
    finally:
        for layer, mode in modes:
            layer.training = mode
    return samples


def _compare(sample: int, exact: dict[str, float], engine: dict[str, float]) -> None:
    floor = 1e-6 * sum(exact.values())
    for name, square in exact.items():
        if TOO_SMALL * square - floor <= engine[name] <= TOO_LARGE * square + floor:
            continue
        raise NotPrivateError(
            f"the self-check of {name!r} expected a gradient norm of {square**0.5:.6g} for sample {sample} "
            f"alone, got {engine[name] ** 0.5:.6g} in a batch: samples influence one another, the loss is "
            "normalised by other samples, or the parameter is used in a way its rule does not know. Make "
            "every row's loss depend on that row only, or freeze the parameter."
        )


def _rows(args: Any, kwargs: Any, rows: int, part: slice) -> Any:
    def cut(item: Any) -> Any:
        batched = isinstance(item, torch.Tensor) and item.dim() > 0 and item.shape[0] == rows
        return item[part].detach() if batched else item

    return pytree.tree_map(cut, (args, kwargs))


def _outputs(output: Any, rows: int) -> tuple[bool, list[torch.Tensor]]:
    """The tensors to differentiate: a scalar loss that the module computes itself, or its rows."""
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    found = [leaf for leaf in found if leaf.requires_grad]
    scalars = [leaf for leaf in found if leaf.dim() == 0]
    if scalars:
        return True, scalars
    if not found or any(leaf.shape[0] != rows for leaf in found):
        shapes = [tuple(leaf.shape) for leaf in found]
        raise NotPrivateError(
            f"the module must return tensors with one row per sample ({rows} rows) or its own scalar loss, "
            f"got {shapes or 'no tensor with a gradient'}; return the logits."
        )
    return False, found


def _probes(leaves: list[torch.Tensor], scalar: bool) -> list[torch.Tensor]:
    if scalar:
        return [torch.ones_like(leaf) for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf) for leaf in leaves]
