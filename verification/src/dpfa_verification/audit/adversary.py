"""Gradient ascent on pairs of neighbours: how far does one record move a release without noise?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpfa_core.contracts import Backend, PlanTensors
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, PrivacySpec

Inputs = tuple[Tensor, Tensor, Tensor]
Release = Callable[[Tensor, Tensor, Tensor, AttentionProblem], Tensor]
"""A release without noise, differentiable: (q, k, v, problem) to [B, S, H, D]."""

RATE = 0.3
"""Of Adam, in units of inputs that begin as standard normals."""

PATIENCE, PROGRESS = 10, 1e-4
"""The climb ends where this many steps brought less than this share."""


@dataclass(frozen=True)
class Attack:
    """The farthest pair of neighbours that was found."""

    distance: float
    """Between their two releases, in the norm that was asked for."""
    problem: AttentionProblem
    """Of one of the two: a batch of one row."""
    one: Inputs
    two: Inputs
    record: tuple[int | None, int | None]
    """(query row, key) in which the two differ; (None, None) for the whole sequence."""


def ascend(
    release: Release,
    spec: PrivacySpec,
    problem: AttentionProblem,
    norm: Norm = "l2",
    *,
    steps: int = 300,
    restarts: int = 2,
    seed: int = 0,
) -> Attack:
    """Climb from random inputs, `restarts` times for every record of every batch row, all at once.

    Each pair takes two batch rows of one call, so `release` must treat batch rows alike and apart. What is found
    is reached, so it is a lower bound on the sensitivity of `release`; that nothing farther exists is not shown.

    Guarantee: tested (reaches bounds that are attained; passes the bound of each broken twin).
    Args:
        release: called with inputs of the problem's dtype and a problem whose batch is that of the pairs.
        spec: its unit, relation and queries say what neighbours are; epsilon and delta are not used.
        norm: "l1" or "l2".
        steps: at most.
    """
    dice = torch.Generator().manual_seed(seed)
    records = [pair for pair in _records(spec, problem) for _ in range(restarts)]
    count = len(records)
    many = replace(problem, batch=2 * count, lengths=tuple(pair[0] for pair in records) * 2 if problem.lengths else ())
    rows, keys = (_places(records, which, problem) for which in (1, 2))
    queries = (count, problem.q_len, problem.q_heads, problem.head_dim)
    sources = (count, problem.kv_len, problem.kv_heads, problem.head_dim)

    def fresh() -> list[Tensor]:
        shapes = (queries, sources, sources)
        return [torch.randn(shape, generator=dice, dtype=torch.float64).requires_grad_() for shape in shapes]

    shared, other = fresh(), fresh()
    moved = (rows, keys, keys)
    leaves = shared if spec.relation == "add_or_remove" else shared + other
    adam = torch.optim.Adam(leaves, lr=RATE)
    best, found, before = -math.inf, 0, -math.inf
    kept: list[Tensor] = []
    dtype = getattr(torch, problem.dtype)
    for step in range(steps):
        if step % PATIENCE == PATIENCE - 1:
            if best <= before * (1.0 + PROGRESS):
                break
            before = best
        # a removed record is a null record in the same place
        gone = [torch.zeros_like(x) for x in other] if spec.relation == "add_or_remove" else other
        two = [torch.where(where, y, x) for where, x, y in zip(moved, shared, gone, strict=True)]
        both = [torch.cat([x, y]).to(dtype) for x, y in zip(shared, two, strict=True)]
        out = release(both[0], both[1], both[2], many).double()
        apart = (out[:count] - out[count:]).flatten(1)
        lengths = apart.abs().sum(1) if norm == "l1" else (apart.square().sum(1) + 1e-300).sqrt()
        if float(lengths.detach().max()) > best:
            best, found = float(lengths.detach().max()), int(lengths.detach().argmax())
            kept = [x.detach()[[found, count + found]].clone() for x in both]
        adam.zero_grad()
        (-lengths.sum()).backward()
        adam.step()
    lengths_of, row, key = records[found]
    alone = replace(problem, batch=1, lengths=(lengths_of,) if problem.lengths else ())
    one, two_kept = ((kept[0][side], kept[1][side], kept[2][side]) for side in (slice(0, 1), slice(1, 2)))
    record = (None, None) if spec.unit == "sequence" else (row, key)
    return Attack(best, alone, one, two_kept, record)


def noiseless(backend: Backend, norm: Norm = "l2", tensors: PlanTensors | None = None) -> Release:
    """A backend's release without noise, with rows clipped in `norm`, on the tape by the backend's own backward."""
    plan = NoisePlan(mechanism="none", distribution="none", head_scale=(0.0,), norm=norm, transform="bm64")
    given = PlanTensors() if tensors is None else tensors

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
            scale = problem.head_dim**-0.5
            out, ctx.saved = backend.release(q, k, v, problem, plan, given, None, softmax_scale=scale)  # type: ignore[arg-type]
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            return (*backend.release_backward(dout, ctx.saved), None)

    def release(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
        out: Tensor = Silent.apply(q, k, v, problem)  # type: ignore[no-untyped-call]
        return out

    return release


Record = tuple[tuple[int, int], int | None, int | None]
"""The lengths of its batch row, and the query row and the key that belong to it (None: it has none)."""


def _records(spec: PrivacySpec, problem: AttentionProblem) -> list[Record]:
    found: list[Record] = []
    for lengths in sorted(set(problem.lengths)) or [(problem.q_len, problem.kv_len)]:
        queries, keys = lengths
        if spec.unit == "sequence":
            found.append((lengths, None, None))
            continue
        behind = keys - queries
        for position in range(min(0, behind) if spec.queries == "private" else 0, keys):
            own = position - behind
            row = own if spec.queries == "private" and 0 <= own < queries else None
            found.append((lengths, row, position if position >= 0 else None))
    return found


def _places(records: list[Record], which: int, problem: AttentionProblem) -> Tensor:
    """bool [pairs, length, 1, 1]: the rows that change; for a whole sequence all of them."""
    length = problem.q_len if which == 1 else problem.kv_len
    place = torch.zeros(len(records), length, dtype=torch.bool)
    for pair, record in enumerate(records):
        if record[1] is None and record[2] is None:
            place[pair] = True
        elif (at := record[which]) is not None:
            place[pair, at] = True
    return place[:, :, None, None]
