"""A release that activation checkpointing runs a second time: the same noise for the same numbers, charged once."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from dpfa_core.errors import NotPrivateError

REMEMBERED = 1 << 15
"""Releases inside checkpointed regions of which the ticket is kept, for when they are recomputed."""

_SECRET = os.urandom(32)
_CHECKPOINT = torch.utils.checkpoint.__file__
_lock = threading.Lock()
# name of the numbers -> [ticket, how often it was recomputed] of each release of these numbers
_tickets: OrderedDict[bytes, list[list[Any]]] = OrderedDict()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def in_backward() -> bool:
    """Is a backward pass running, which is when checkpointing recomputes?"""
    return bool(torch._C._current_graph_task_id() != -1)


def checkpointed(*, gradients: bool) -> bool:
    """Is ``torch.utils.checkpoint`` among the callers, in a forward that a backward pass may recompute?

    Args: `gradients` were enabled where the release was called.
    """
    frame = sys._getframe()
    while frame is not None:
        # the reentrant kind runs its forward without gradients; the other kind then never comes back
        code = frame.f_code
        if code.co_filename == _CHECKPOINT and (gradients or code.co_qualname.startswith("CheckpointFunction.")):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call]
def tracing_checkpoint() -> bool:
    """Is ``torch.compile`` tracing the inside of a checkpointed region, for which it makes one graph?"""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname.startswith("CheckpointHigherOrderVariable."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def name_of(tensors: tuple[Tensor | None, ...], terms: tuple[Any, ...]) -> bytes:
    """A name for these very bits under these terms; nobody outside the process can make or test one."""
    digest = hashlib.blake2b(repr(terms).encode(), key=_SECRET, digest_size=32)
    for tensor in tensors:
        digest.update(repr(None if tensor is None else (tensor.shape, tensor.dtype)).encode())
        if tensor is not None and tensor.numel():
            digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def remember(name: bytes, ticket: Tensor) -> None:
    with _lock:
        _tickets.setdefault(name, []).append([ticket.clone(), 0])
        _tickets.move_to_end(name)
        while len(_tickets) > REMEMBERED:
            _tickets.popitem(last=False)


def recalled(name: bytes) -> Tensor:
    """The ticket of the release that is being recomputed.

    It is found by the numbers themselves, so that noise never meets other numbers than the first time. Of equal
    numbers that were released several times, those whose turn has come are left out.

    Raises: NotPrivateError where no release had these numbers, or several may be meant.
    """
    with _lock:
        found = _tickets.get(name, [])
        waiting = [entry for entry in found if not entry[1]] or found
        if len(waiting) == 1:
            waiting[0][1] += 1
            ticket: Tensor = waiting[0][0]
            return ticket.clone()
    if not found:
        raise NotPrivateError(
            "a release inside a backward pass must be the recomputation of one that torch.utils.checkpoint ran before, "
            "got numbers that were not released there: other numbers would need other noise, and that would be a "
            "second release; make what comes before the release deterministic, or keep it outside what is recomputed."
        )
    raise NotPrivateError(
        f"a release that is recomputed must be known by its numbers, got {len(waiting)} releases of equal numbers that "
        "wait for their recomputation; run their backward passes one after the other, or keep the release outside "
        "what is checkpointed."
    )
