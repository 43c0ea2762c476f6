"""Three operators: one draws and records, one is a pure function of what was drawn, one is its gradient.

A compiler may merge equal calls of a pure function, and it may not touch the order of what changes memory. So what
must happen once for each run (the noise's number, the ledger's line) is an operator that changes a tensor, and the
noised attention is a function of its result. See docs/adr/0017-draw-then-compute.md.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from dpfa_attention.biases import check_finite
from dpfa_attention.default_ledger import ledger_numbered
from dpfa_attention.noise_keys import key_of, release_key
from dpfa_attention.recomputation import checkpointed, in_backward, name_of, recalled, remember
from dpfa_attention.structure_tensors import structure_tensors
from dpfa_attention.terms import SCHEMA, Agreed, Terms, agreed
from dpfa_core import selection
from dpfa_core.errors import NotPrivateError

TICKET = 4
"""Numbers of a ticket: process, release number, and the two halves of the ledger line's id."""

DRAWN = torch.zeros(1, dtype=torch.int64)
"""Changed by every draw, so that a graph keeps each of them, in order."""


@torch.library.custom_op(
    "dpfa::draw_release",
    mutates_args={"drawn"},
    schema=f"(Tensor(a!) drawn, Tensor q, Tensor k, Tensor v, SymInt copies, bool gradients, {SCHEMA}, "
    "Tensor? bias=None) -> Tensor",
)
def draw_release(drawn: Tensor, q: Tensor, k: Tensor, v: Tensor, copies: int, gradients: bool, *values: Any) -> Tensor:
    """Charge the ledger with `copies` releases of q, k, v and return the ticket of their noise.

    `gradients` says whether they were enabled. In a backward pass the ticket is that of the release that is
    recomputed, and nothing is charged.
    """
    terms, bias = Terms.parted(values)
    if in_backward():
        return recalled(name_of((q, k, v, bias), terms))
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotPrivateError(
            "a release must run for each output, got a stream that is being captured: a replayed graph would add the "
            "same noise again and record nothing; keep the call outside the captured graph."
        )
    what = agreed(q, k, v, terms, bias)
    check_finite(bias)
    ledger = ledger_numbered(terms.ledger, what.spec)
    key = release_key(terms.seed, torch.device("cpu"))
    event_id = ledger.record(
        what.priced.event,
        purpose=_purpose(what, secure=key.secure),
        mechanism=what.priced.mechanism,
        backend=what.backend,
        count=copies,
    )
    drawn.add_(1)
    halves = (int.from_bytes(half, "big", signed=True) for half in _halves(bytes.fromhex(event_id)))
    ticket = torch.tensor([os.getpid(), int(key.release.view(torch.int64)), *halves])
    if checkpointed(gradients=gradients):
        remember(name_of((q, k, v, bias), terms), ticket)
    return ticket


@draw_release.register_fake
def _(drawn: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> Tensor:
    return torch.empty(TICKET, dtype=torch.int64)


@torch.library.custom_op(
    "dpfa::release",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor ticket, {SCHEMA}, Tensor? bias=None) -> Tensor",
)
def release(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *values: Any) -> Tensor:
    """Noised attention [B, S, H, D]: the same bits for the same arguments."""
    terms, bias = Terms.parted(values)
    what = agreed(q, k, v, terms, bias)
    process, number = ticket[:2].tolist()
    key = key_of(terms.seed, process, number, q.device)
    return _computed(q, k, v, bias, what, key)[0].contiguous()


@release.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *values: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "dpfa::release_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, {SCHEMA}, Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
)
def release_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v; the noise has none."""
    terms, bias = Terms.parted(values)
    what = agreed(q, k, v, terms, bias)
    backend = selection.backend(what.backend)
    if hasattr(backend, "saved"):
        tensors = structure_tensors(what.priced.plan, what.problem, q.device)
        saved = backend.saved(
            *(q, k, v, what.problem, what.priced.plan, tensors),
            softmax_scale=what.softmax_scale,
            **_beside(bias),
        )
    else:
        # a backward knows nothing of the noise, so what it needs is what a release without noise leaves behind
        silent = dataclasses.replace(
            what.priced.plan, distribution="none", head_scale=(0.0,), row_scale=(1.0,), noiseless_heads=False
        )
        priced = dataclasses.replace(what.priced, plan=silent)
        saved = _computed(q, k, v, bias, what._replace(priced=priced), None)[1]
    dq, dk, dv = backend.release_backward(dout, saved)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@release_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def line_of(ticket: Tensor) -> str:
    """The id of the ledger's line that a ticket was charged to."""
    return b"".join(half.to_bytes(8, "big", signed=True) for half in ticket[2:].tolist()).hex()


def _computed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, what: Agreed, key: Any) -> tuple[Tensor, Any]:
    plan, problem = what.priced.plan, what.problem
    tensors = structure_tensors(plan, problem, q.device)
    out, saved = selection.backend(what.backend).release(
        q, k, v, problem, plan, tensors, key, softmax_scale=what.softmax_scale, **_beside(bias)
    )
    return out, saved


def _beside(bias: Tensor | None) -> dict[str, Tensor]:
    # a backend that was written before there were biases is not asked about one
    return {} if bias is None else {"bias": bias}


def _purpose(what: Agreed, *, secure: bool) -> str:
    notes = {
        "queries declared public": what.spec.queries == "public",
        "noise from a seed, not secure": not secure,
        "some heads without noise": what.priced.plan.noiseless_heads,
    }
    return "; ".join(("release", *(note for note, applies in notes.items() if applies)))


def _halves(identity: bytes) -> tuple[bytes, bytes]:
    return identity[:8], identity[8:]
