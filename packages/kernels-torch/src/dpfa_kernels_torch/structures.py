"""What a noise structure asks of a backend: its parameters, and the tensors made from its seed."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.contracts import PlanTensors
from dpfa_core.spec import AttentionProblem, NoisePlan, Reasons
from dpfa_kernels_torch.noise.release_noise import drawn_columns

COLUMNS = {"low_rank": "rank", "sparse": "kept"}
"""The parameter that counts the columns a structure projects to."""


def against_structure(problem: AttentionProblem, plan: NoisePlan) -> Reasons:
    """Reasons against the plan's structure and the norm that goes with it."""
    structure = plan.structure
    kind = None if structure is None else structure.kind
    if plan.norm == "whitened_l2" and kind != "block_diagonal":
        return ("A clip in whitened_l2 needs a block_diagonal structure, which whitens.",)
    if structure is None:
        return ()
    reasons = []
    if plan.distribution not in ("gaussian", "none"):
        reasons.append(f"A structure shapes gaussian noise, got {plan.distribution}.")
    if kind in COLUMNS:
        name = COLUMNS[kind]
        columns = dict(structure.parameters).get(name, 0)
        if not 1 <= columns <= problem.head_dim or columns != int(columns):
            reasons.append(
                f"A {kind} structure needs the parameter {name!r}, an integer from 1 to {problem.head_dim}, "
                f"got {structure.parameters}."
            )
    return tuple(reasons)


def fitting(
    tensors: PlanTensors | None, problem: AttentionProblem, plan: NoisePlan, device: torch.device
) -> PlanTensors:
    """The tensors, if they are the ones that the plan's structure needs.

    | structure | release |
    |---|---|
    | none | f + z |
    | low_rank, sparse | (f @ project + z) @ mix.T, rounded before it is lifted |
    | block_diagonal | f + z @ mix.T; with norm="whitened_l2", f clipped by the norm of f @ whiten |

    Raises: PrivacyParameterError for a tensor that is missing, of another shape or elsewhere, or not wanted.
    """
    tensors = tensors or PlanTensors()
    D, columns = problem.head_dim, drawn_columns(plan, problem.head_dim)
    structure = plan.structure
    if structure is None:
        shapes: dict[str, tuple[int, int]] = {}
    elif structure.kind in COLUMNS:
        shapes = {"project": (D, columns), "mix": (D, columns)}
    else:
        shapes = {"mix": (D, D)} | ({"whiten": (D, D)} if plan.norm == "whitened_l2" else {})
    for name in ("project", "mix", "whiten"):
        found, shape = getattr(tensors, name), shapes.get(name)
        good = (
            found is None
            if shape is None
            else isinstance(found, Tensor) and found.shape == shape and found.device == device
        )
        require(
            good,
            f"{name} must be " + ("None" if shape is None else f"a tensor {list(shape)} on {device}"),
            f"{list(found.shape)} on {found.device}" if isinstance(found, Tensor) else type(found).__name__,
            "It is made from the plan's structure.",
        )
    return tensors
