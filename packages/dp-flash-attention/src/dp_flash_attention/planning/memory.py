"""Bytes that follow from the shapes alone; what depends on the implementation is named and left out."""

from __future__ import annotations

from dpfa_core.spec import AttentionProblem

FLOAT32 = 4
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}
"""Numbers of state for each parameter."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def training_memory(parameters: int, optimizer: str) -> dict[str, int]:
    """Bytes of one replica in float32; activations come on top and depend on the model and the micro-batch."""
    parts = {
        "weights": parameters * FLOAT32,
        "gradient": parameters * FLOAT32,
        "optimizer": OPTIMIZERS[optimizer] * parameters * FLOAT32,
        "noise": parameters * FLOAT32,
    }
    return parts | {"total": sum(parts.values())}


def release_memory(problem: AttentionProblem, random_numbers: int) -> dict[str, int]:
    """Bytes of the tensors of one call, and of its noise if it is written out in float32."""
    size = DTYPE_BYTES[problem.dtype]
    row = problem.batch * problem.head_dim * size
    parts = {
        "q": row * problem.q_len * problem.q_heads,
        "k": row * problem.kv_len * problem.kv_heads,
        "v": row * problem.kv_len * problem.kv_heads,
        "out": row * problem.q_len * problem.q_heads,
        "noise": random_numbers * FLOAT32,
    }
    return parts | {"total": sum(parts.values())}
