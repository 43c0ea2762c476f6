"""Whether a plan says all that is needed to make its noise."""

from __future__ import annotations

import math

from dpfa_core.spec import NoisePlan, Structure
from dpfa_verification.conformance.obligation import holds

PARAMETERS = {
    "low_rank": {"rank"},
    "sparse": {"sparsity", "kept", "rescale"},
    "block_diagonal": {"block_size", "condition"},
}


def complete(plan: NoisePlan, head_dim: int) -> None:
    """Grid, norm and structure belong together, and each parameter is there and within its range."""
    holds(
        (plan.distribution == "discrete_gaussian") == (plan.grid > 0),
        f"a grid > 0 belongs to discrete noise, and to no other; it is {plan.grid!r} for {plan.distribution!r}",
    )
    holds(plan.grid == 0 or math.frexp(plan.grid)[0] == 0.5, f"the grid {plan.grid!r} is not a power of two")
    if plan.structure is None:
        holds(plan.norm != "whitened_l2", "the norm whitened_l2 needs a covariance, and the plan has no structure")
        return
    kind = plan.structure.kind
    holds(
        plan.norm != "whitened_l2" or kind == "block_diagonal",
        f"the norm whitened_l2 needs a covariance, and the structure is {kind}",
    )
    holds(plan.distribution == "gaussian", f"{plan.distribution!r} noise with a {kind} structure has no theorem")
    _parameters(plan.structure, head_dim)


def _parameters(structure: Structure, head_dim: int) -> None:
    parameters = dict(structure.parameters)
    holds(
        set(parameters) == PARAMETERS[structure.kind] and len(parameters) == len(structure.parameters),
        f"a {structure.kind} structure has the parameters {sorted(PARAMETERS[structure.kind])}, each once; "
        f"it has {structure.parameters}",
    )
    counts = [parameters[name] for name in ("rank", "kept", "block_size") if name in parameters]
    within = all(count == int(count) and 1 <= count <= head_dim for count in counts)
    if structure.kind == "sparse":
        sparsity = parameters["sparsity"]
        within = within and 0 <= sparsity < 1 and parameters["rescale"] in (0, 1)
        within = within and parameters["kept"] == max(1, round((1 - sparsity) * head_dim))
    if structure.kind == "block_diagonal":
        within = within and 1 <= parameters["condition"] < math.inf
    holds(within, f"for a head dimension of {head_dim} the parameters {structure.parameters} are out of range")
