"""Before the first step: does the engine see exactly each sample's own gradient in this very model?

A few samples go through the recorded model together and through the plain model one by one. A use of a
parameter that its rule does not fit, samples that influence one another, a loss that is normalised by other
samples' tokens, and a parameter that is never used all show as a difference.
"""

from __future__ import annotations

import inspect
import logging
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training.plan import Reduction
from dpfa_training.recording import Recording
from dpfa_training.tape import Note, Tape

_log = logging.getLogger("dpfa_training")

SAMPLES = 4
TOO_SMALL, TOO_LARGE = 0.999, 1.25
"""Allowed ratio of the engine's norm bound to the exact norm (squared); it may be large, not small."""
TOO_FAR = 0.05
"""Allowed distance of the engine's gradient from the exact one, relative to its norm."""
MOVED = 1e-3
"""Allowed change of the others' squared norms when one sample changes."""

Squares = dict[str, torch.Tensor]
Notes = dict[str, Note]


def self_check(recording: Recording, backend: Any, args: Any, kwargs: Any, rows: int, reduction: Reduction) -> int:
    """Compare per-sample gradients on up to four samples of a real batch; first survey the parameters' uses.

    Guarantee: tested (it rejects BatchNorm-like coupling, token-mean losses and wrong rules).
    Returns: how many samples were compared; the logger "dpfa_training" says so in one line, at level INFO.
    Raises: NotPrivateError naming the parameter, both norms and the remedy.
    """
    samples = min(SAMPLES, rows)
    parameters = recording.parameters
    _refuse_hooks(parameters)
    modes = [(layer, layer.training) for layer in recording.module.modules()]
    try:
        with ExitStack() as quiet:
            quiet.enter_context(torch.random.fork_rng(devices=[]))
            quiet.enter_context(torch.enable_grad())
            for device in {parameter.device.type for parameter in parameters.values()}:
                quiet.enter_context(torch.autocast(device, enabled=False))  # differences must not drown in rounding
            for layer, _ in modes:  # dropout off: the two passes must compute the same function
                layer.training = False

            def forward(picked: list[int], edit: Any = lambda args, kwargs: (args, kwargs)) -> Any:
                own_args, own_kwargs = edit(*_rows(args, kwargs, rows, picked))
                return recording.module.forward(*own_args, **own_kwargs)

            recording.survey(forward, samples, (args, kwargs))
            notes, probes, scalar = _together(recording, (args, kwargs), forward, [*range(samples)])
            squares = _squares(backend, notes)
            unused = [name for name in parameters if name not in squares]
            if unused:
                raise NotPrivateError(
                    f"every trainable parameter must be used in a forward, got none for {unused}; "
                    "freeze what is not used (requires_grad_(False))."
                )
            scale = samples if scalar and reduction == "mean" else 1
            for index in range(samples):
                _, own = _outputs(forward([index]), 1)
                cotangents = probes if scalar else [probe[index : index + 1] for probe in probes]
                _compare(index, _exact(parameters, own, cotangents), squares, notes, backend, scale)
            if samples > 1:
                others = [1, *range(1, samples)]
                after, _, _ = _together(recording, (args, kwargs), forward, others, probes)
                _unmoved(squares, _squares(backend, after))
                if scalar:  # the module's own loss: would it be divided by the number of everybody's tokens?
                    edited = partial(forward, edit=partial(_shortened, recording.module))
                    after, _, _ = _together(recording, (args, kwargs), edited, [*range(samples)], probes)
                    _unmoved(squares, _squares(backend, after))
    finally:
        for layer, mode in modes:
            layer.training = mode
    _log.info(
        "self-check passed: %d samples have the gradients in a batch that they have alone, in all %d parameters%s.",
        samples,
        len(parameters),
        ", and none moves another's" if samples > 1 else "",
    )
    return samples


def _refuse_hooks(parameters: dict[str, torch.nn.Parameter]) -> None:
    """They would be given the gradients of single samples here, and nothing later."""
    for name, parameter in parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotPrivateError(
                f"{name!r} must have no gradient hooks, got some: a private gradient does not come by way of them, and "
                "what they saw of plain ones would be without noise. Remove them; change gradients in the optimiser."
            )


def _together(
    recording: Recording, inputs: Any, forward: Any, picked: list[int], probes: list[torch.Tensor] | None = None
) -> tuple[Notes, list[torch.Tensor], bool]:
    """What one recorded pass over these samples notes, the cotangents used, and whether the output is a loss."""
    notes: Notes = {}
    with recording.to(Tape(len(picked), lambda tape: notes.update(tape.merged())), inputs):
        scalar, leaves = _outputs(forward(picked), len(picked))
        used = _probes(leaves, scalar) if probes is None else probes
        recording.recorded(leaves)  # as in a step: a checkpointed block runs a backward of its own inside this one
        torch.autograd.backward(leaves, used)
    return notes, used, scalar


def _exact(
    parameters: dict[str, torch.nn.Parameter], outputs: list[torch.Tensor], cotangents: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Plain autograd's gradients, by backward: reentrant checkpointing knows no ``torch.autograd.grad``."""
    held = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        torch.autograd.backward(outputs, cotangents)
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = held[name]


def _squares(backend: Any, notes: Notes) -> Squares:
    return {name: backend.sqnorm(note.kind, note.saved) for name, note in notes.items()}


def _compare(
    sample: int, exact: dict[str, torch.Tensor], found: Squares, notes: Notes, backend: Any, scale: float
) -> None:
    squares = {name: float(gradient.double().square().sum()) for name, gradient in exact.items()}
    if not math.isfinite(sum(squares.values())):
        # nothing to compare with; such a sample must not be taken for one that can be clipped
        if all(bool(torch.isfinite(norms[sample])) for norms in found.values()):
            raise NotPrivateError(
                f"the self-check expected no finite gradient norm for sample {sample}, whose gradient is not finite, "
                "got one: a parameter is used in a way its rule does not know. Freeze the parameter."
            )
        return
    floor = 1e-6 * sum(squares.values())
    for name, square in squares.items():
        engine = float(found[name][sample]) * scale**2
        if not TOO_SMALL * square - floor <= engine <= TOO_LARGE * square + floor:
            raise NotPrivateError(
                f"the self-check of {name!r} expected a gradient norm of {square**0.5:.6g} for sample {sample} "
                f"alone, got {engine**0.5:.6g} in a batch: samples influence one another, the loss is "
                "normalised by other samples, or the parameter is used in a way its rule does not know. Make "
                "every row's loss depend on that row only, or freeze the parameter."
            )
        only = torch.zeros_like(found[name], dtype=torch.float32)
        only[sample] = 1.0
        ours = backend.clipped_grad(notes[name].kind, notes[name].saved, only).double() * scale
        away = float((ours.reshape(exact[name].shape) - exact[name].double()).square().sum())
        if not away <= TOO_FAR**2 * square + floor:
            raise NotPrivateError(
                f"the self-check of {name!r} expected the gradient of sample {sample} alone (norm "
                f"{square**0.5:.6g}), got one that is {away**0.5:.6g} away from it in a batch: the parameter is used "
                "in a way its rule does not know. Freeze the parameter."
            )


def _unmoved(before: Squares, after: Squares) -> None:
    """One sample was replaced: the norms of the others must stay."""
    total = torch.stack(list(before.values())).sum(0)[1:]
    known, floor = total.isfinite(), 1e-6 * total
    for name, squares in before.items():
        change = (after.get(name, torch.zeros_like(squares)) - squares)[1:].abs()
        if bool((change <= MOVED * squares[1:] + floor)[known].all()):
            continue
        raise NotPrivateError(
            f"the self-check of {name!r} expected the gradients of a sample to stay when another one changes, got "
            "another norm: samples influence one another, or the loss is normalised by other samples' tokens. Make "
            "every row's loss depend on that row only."
        )


def _shortened(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments with the first sample cut to half its tokens, as far as their names say how.

    Masks become 0; labels of a model in the style of transformers become -100, which its losses leave out.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)

    def half(name: str, item: Any) -> Any:
        value = 0 if "mask" in name else -100 if "label" in name and hasattr(module, "config") else None
        if value is None or not isinstance(item, torch.Tensor) or item.dim() != 2:
            return item
        item = item.clone()
        item[0, item.shape[1] // 2 :] = value
        return item

    for name, item in bound.arguments.items():
        inner = {key: half(key, one) for key, one in item.items()} if isinstance(item, dict) else None
        bound.arguments[name] = half(name, item) if inner is None else inner
    return bound.args, bound.kwargs


def _rows(args: Any, kwargs: Any, rows: int, picked: list[int]) -> Any:
    def cut(item: Any) -> Any:
        batched = isinstance(item, torch.Tensor) and item.dim() > 0 and item.shape[0] == rows
        return item.detach()[picked] if batched else item

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
