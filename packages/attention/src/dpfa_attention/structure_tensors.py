"""The public tensors of a noise structure, made from the seed in the plan."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.contracts import PlanTensors
from dpfa_core.spec import AttentionProblem, NoisePlan, Norm, Structure
from dpfa_mechanisms.block_diagonal import LARGEST_CONDITION
from dpfa_mechanisms.planning import block_spectrum

NONE = PlanTensors()


def structure_tensors(plan: NoisePlan, problem: AttentionProblem, device: torch.device) -> PlanTensors:
    """What a backend multiplies by where the plan has a structure; float32 on `device`, made once and kept.

    | kind | project | mix | whiten |
    |---|---|---|---|
    | low_rank | U [D, rank], orthonormal columns | U | |
    | sparse | the kept columns of the identity, times 1 / (1 - sparsity) if rescaled | without the factor | |
    | block_diagonal | | Sigma**(1/2) [D, D] | Sigma**(-1/2), where rows are clipped in its norm |

    Rotations are uniform over the orthogonal matrices, computed in float64 and rounded once; all heads share one.

    Guarantee: tested (orthonormal columns, spectrum, the same bits from one seed).
    Raises: PrivacyParameterError for parameters that a structure needs and the plan lacks or has out of range.
    Source: PRIVACY P5.
    """
    if plan.structure is None:
        return NONE
    return _made(plan.structure, problem.head_dim, plan.norm, device)


@lru_cache(maxsize=64)
def _made(structure: Structure, head_dim: int, norm: Norm, device: torch.device) -> PlanTensors:
    make = {"low_rank": _low_rank, "sparse": _sparse, "block_diagonal": _block_diagonal}[structure.kind]
    # what is kept must serve every later call, whatever modes the first one runs under
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        project, mix, whiten = make(structure, head_dim)
        made = (project, mix, whiten if norm == "whitened_l2" else None)
        return PlanTensors(*(x if x is None else x.to(device=device, dtype=torch.float32) for x in made))


def _low_rank(structure: Structure, head_dim: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    basis = _rotation(structure, head_dim, _count(structure, "rank", head_dim))
    return basis, basis, None


def _sparse(structure: Structure, head_dim: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    kept = _count(structure, "kept", head_dim)
    columns = torch.argsort(_words(structure, "columns", head_dim), stable=True)[:kept].sort().values
    mix = torch.eye(head_dim, dtype=torch.float64)[:, columns]
    if not _number(structure, "rescale"):
        return mix, mix, None
    sparsity = _number(structure, "sparsity")
    require(0 <= sparsity < 1, "sparsity must be in [0, 1)", sparsity)
    return mix / (1.0 - sparsity), mix, None


def _block_diagonal(structure: Structure, head_dim: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    condition = _number(structure, "condition")
    require(condition <= LARGEST_CONDITION, f"condition must be at most {LARGEST_CONDITION:g}", condition)
    blocks = block_spectrum(head_dim, _count(structure, "block_size", head_dim), condition)
    mix, whiten, first = [], [], 0
    for eigenvalues in blocks:
        turn = _rotation(structure, len(eigenvalues), len(eigenvalues), f"block {first}")
        root = torch.tensor(eigenvalues, dtype=torch.float64).sqrt()
        mix.append((turn * root) @ turn.T)
        whiten.append((turn / root) @ turn.T)
        first += len(eigenvalues)
    return None, torch.block_diag(*mix), torch.block_diag(*whiten)  # type: ignore[no-untyped-call]


def _rotation(structure: Structure, rows: int, columns: int, name: str = "rotation") -> Tensor:
    """Orthonormal columns, float64 [rows, columns], uniform over all such matrices."""
    normals = _normals(structure, name, rows * columns).reshape(rows, columns)
    basis, triangle = torch.linalg.qr(normals)
    # the signs that a decomposition chooses are undone, or the directions would not be uniform
    turned: Tensor = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return turned


def _normals(structure: Structure, name: str, count: int) -> Tensor:
    pairs = -(-count // 2)
    # 53 bits each, in (0, 1): these coins are public, so nobody cares how far the tails reach
    uniform = ((_words(structure, name, 2 * pairs) >> 11) & (2**53 - 1)).double().add(0.5).mul(2.0**-53)
    radius, angle = torch.sqrt(-2.0 * torch.log(uniform[:pairs])), 2.0 * math.pi * uniform[pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:count]


def _words(structure: Structure, name: str, count: int) -> Tensor:
    """Public random words, int64 [count], from SHAKE-256: the same with every version of every library."""
    label = f"dpfa/structure/{structure.kind}/{structure.seed}/{name}"
    return torch.frombuffer(bytearray(hashlib.shake_256(label.encode()).digest(8 * count)), dtype=torch.int64)


def _number(structure: Structure, name: str) -> float:
    parameters = dict(structure.parameters)
    require(name in parameters, f"{structure.kind} noise needs the parameter {name!r}", structure.parameters)
    return float(parameters[name])


def _count(structure: Structure, name: str, most: int) -> int:
    number = _number(structure, name)
    whole = 1 <= number <= most and number == int(number)
    require(whole, f"{name} must be an integer from 1 to {most}", number)
    return int(number)
