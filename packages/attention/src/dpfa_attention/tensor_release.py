"""The slow path: attention without noise, finished by a mechanism that works on tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dpfa_attention.biases import check_finite
from dpfa_attention.default_ledger import ledger_numbered
from dpfa_attention.options import resolve
from dpfa_attention.pricing import price
from dpfa_attention.problem import attention_problem
from dpfa_attention.recomputation import in_backward
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import require
from dpfa_core.contracts import TensorMechanism
from dpfa_core.errors import NotPrivateError, PluginError
from dpfa_core.events import Event, NonPrivate
from dpfa_core.ledger import Ledger
from dpfa_core.plugin_names import parts
from dpfa_core.registry import MECHANISMS, Entry
from dpfa_core.spec import PrivacySpec
from dpfa_mechanisms.sensitivity import sensitivity

NORMS = {"l1": "laplace", "l2": "gaussian"}
"""Which mechanism's clip a noiseless release borrows."""

Found = tuple[Entry, TensorMechanism]


def tensor_mechanism(mechanism: Any, noise_structure: str | None = None) -> Found | None:
    """The mechanism and where it comes from, if it is one that works on tensors: an object, or an installed name."""
    if isinstance(mechanism, str):
        if noise_structure is not None:
            return None
        entry = MECHANISMS.entry(resolve(mechanism)[0])
        # ours all plan their noise; a third party's has to be loaded to know
        return None if entry.first_party else _installed(entry)
    good = callable(getattr(mechanism, "add_noise", None)) and not isinstance(mechanism, type)
    require(
        good,
        "mechanism must be the name of an installed mechanism, or an object with add_noise",
        mechanism.__name__ if isinstance(mechanism, type) else type(mechanism).__name__,
        'A planned mechanism is asked for by name and parameters: "low_rank(rank=8)".',
    )
    kind = type(mechanism)
    name = str(getattr(mechanism, "name", kind.__name__))
    taken = {parts(name)[0], resolve(name)[0]} & {entry.name for entry in MECHANISMS.entries() if entry.first_party}
    require(
        not taken,
        "a mechanism of your own must have a name of its own, or the ledger would credit its noise to another",
        name,
        "Give it another name.",
    )
    return Entry(name, "this process", "unknown version", f"{kind.__module__}:{kind.__qualname__}", False), mechanism


def _installed(entry: Entry) -> Found | None:
    plugin = MECHANISMS.create(entry.name)
    return (entry, plugin) if hasattr(plugin, "add_noise") and not hasattr(plugin, "plan") else None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph would keep somebody's noise as a constant
def tensor_release(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Found,
    spec: PrivacySpec,
    ledger: int,
    *,
    refused: dict[str, Any],
    release: Any,
    **attention: Any,
) -> tuple[Tensor, PrivacyStats]:
    """Attention of q, k, v, clipped in the mechanism's norm, given to its ``add_noise`` and rounded once.

    What ``dp_event`` says is recorded before the noise is asked for, or ``NonPrivate`` where it says nothing. What is
    handed out is the mechanism's tensor; nobody has looked at its noise.

    Args: `ledger`, its number; `refused`, options that must be None; `attention`, the arguments of ``released`` that
    shape the attention; `release` is that function.
    Raises: PluginError for an event that is none or above the promise, or a result of another shape or dtype;
    NotPrivateError for a second run.
    """
    entry, mechanism = found
    for option, value in refused.items():
        require(
            value is None,
            f"{option} must have its default beside a mechanism that works on tensors",
            value,
            "It makes its noise itself.",
        )
    if in_backward() or torch._C._are_functorch_transforms_active():
        raise NotPrivateError(
            f"mechanism {entry.name!r} must run once for each output, got a call inside a backward pass or a transform "
            "of torch.func: that would be a second release, or one noise for several; keep it outside."
        )
    norm = getattr(mechanism, "norm", "l2")
    require(norm in NORMS, f"the norm of mechanism {entry.name!r} must be one of {tuple(NORMS)}", norm)
    check_finite(attention.get("bias"))
    # noise is added in float32 and the sum rounded once
    wide = [x.float() for x in (q, k, v)]
    problem = attention_problem(
        *wide,
        causal=attention["causal"],
        window=attention["window_size"],
        clip=attention["clip"],
        clip_norm=attention["clip_norm"],
        logit_bound=attention["logit_bound"],
        lengths=attention["lengths"],
        mask=attention.get("mask"),
        biased=attention.get("bias") is not None,
    )
    bound = sensitivity(spec, problem, norm)
    event = _event(entry, mechanism, bound.value, spec)
    covered = not isinstance(event, NonPrivate)
    epsilon = price(entry, None, event, spec, spec.delta) if covered else math.inf
    purpose = "release; noise by a mechanism that nobody checked"
    if spec.queries == "public":
        purpose += "; queries declared public"
    book = ledger_numbered(ledger, spec)
    event_id = book.record(event, purpose=purpose, mechanism=entry.name, backend="torch")
    # the ledger of this call ends here: what it is charged with does not leave
    clipped = release(
        *wide,
        **attention,
        epsilon=math.inf,
        delta=0.0,
        unit=spec.unit,
        relation=spec.relation,
        queries=spec.queries,
        mechanism=NORMS[norm],
        ledger=Ledger.memory(),
        backend="torch",
    )
    noised = mechanism.add_noise(clipped, bound.value, spec.epsilon)
    if not (isinstance(noised, Tensor) and noised.shape == clipped.shape and noised.dtype == clipped.dtype):
        got = f"{noised.dtype} {list(noised.shape)}" if isinstance(noised, Tensor) else type(noised).__name__
        raise PluginError(
            f"mechanism {entry.name!r} of {entry.origin} must return a tensor like the one it was given, "
            f"{clipped.dtype} {list(clipped.shape)}, got {got}; correct its add_noise."
        )
    return noised.to(q.dtype), PrivacyStats(
        epsilon_spent=epsilon,
        delta=spec.delta,
        unit=spec.unit,
        relation=spec.relation,
        privacy_mechanism=entry.name,
        noise_multiplier=0.0,
        noise_std=0.0,
        backend="torch",
        event_id=event_id,
        # whose bits these are is not known
        secure_noise=False,
    )


def _event(entry: Entry, mechanism: TensorMechanism, sensitivity: float, spec: PrivacySpec) -> Event:
    ask = getattr(mechanism, "dp_event", None)
    if ask is None:
        return NonPrivate()
    event = ask(sensitivity, spec.epsilon, spec.delta)
    if not isinstance(event, Event):
        raise PluginError(
            f"dp_event of mechanism {entry.name!r} of {entry.origin} must return an event of dpfa_core.events, got "
            f"{event!r}; nothing was released. Correct the mechanism."
        )
    return event
