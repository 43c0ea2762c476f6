"""Noise in a public subspace, for tensors that are no attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpfa_core.checks import integer, positive, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dpfa_core.spec import AttentionProblem, NoisePlan


class StructuredNoiseMechanism:
    """Gaussian noise whose structure is public: a function of `seed`, never of data, and never drawn with the noise.

    Args: `seed` of the structure; the noise itself comes from the operating system.
    """

    def __init__(self, *, seed: int = 0) -> None:
        integer("seed", seed, least=0)
        self.seed = seed

    def low_rank_basis(self, width: int, rank: int = 16) -> Tensor:
        """Orthonormal columns U [width, rank], float32: ``generate_low_rank_noise`` stays in their range."""
        from dpfa_attention.structure_tensors import structure_tensors

        plan, problem = self._plan(1, width, 1.0, 1.0, 1e-6, rank)
        basis = structure_tensors(plan, problem, _cpu()).project
        assert basis is not None  # noqa: S101  (every low_rank plan has one)
        return basis

    def generate_low_rank_noise(
        self, tensor_shape: Sequence[int], sensitivity: float, epsilon: float, delta: float, rank: int = 16
    ) -> Tensor:
        """``Z @ U.T`` with secret Gaussian Z [..., rank] and the public U [width, rank]; nothing is recorded.

        In exact arithmetic ``f @ U @ U.T`` and this noise are (epsilon, delta)-private together. In floating point the
        projection leaves the range of U by its rounding, where there is no noise: a release computes ``f @ U + Z`` and
        lifts what that was rounded to, as mechanism="low_rank" does. f itself, not projected, is not covered at all.

        Guarantee: tested (law, range, the rank of differences tells nothing).
        Args: `tensor_shape` [..., width]; `sensitivity`, the L2 norm of the largest move of the whole tensor.
        Returns: float32, other noise at each call.
        Raises: PrivacyParameterError, also for a rank above the width.
        Source: PRIVACY P5.
        """
        import torch

        from dpfa_attention.noise_keys import release_key
        from dpfa_attention.structure_tensors import structure_tensors
        from dpfa_core.selection import backend

        shape = tuple(tensor_shape)
        good = len(shape) > 0 and all(isinstance(size, int) and size > 0 for size in shape)
        require(good, "tensor_shape must be a list of integers > 0", shape)
        positive("sensitivity", sensitivity)
        positive("epsilon", epsilon)
        rows = math.prod(shape[:-1])
        plan, problem = self._plan(rows, shape[-1], sensitivity, epsilon, delta, rank)
        noise = torch.zeros(1, rows, 1, shape[-1])
        tensors, key = structure_tensors(plan, problem, _cpu()), release_key(None, _cpu())
        made: Tensor = backend("torch").privatize_(noise, problem, plan, tensors, key, clip_rows=False)
        return made.view(shape)

    def _plan(
        self, rows: int, width: int, sensitivity: float, epsilon: float, delta: float, rank: int
    ) -> tuple[NoisePlan, AttentionProblem]:
        """(plan, problem) of a release that can move as far as the tensor can."""
        from dpfa_attention.pricing import priced_release
        from dpfa_core.plugin_names import named
        from dpfa_core.registry import MECHANISMS
        from dpfa_core.spec import AttentionProblem, PrivacySpec

        integer("rank", rank, least=1)
        require(rank <= width, f"rank must be at most the width, {width}", rank)
        problem = AttentionProblem(
            batch=1,
            q_len=rows,
            kv_len=1,
            q_heads=1,
            kv_heads=1,
            head_dim=width,
            # every row may move by twice the clip
            clip_norm=sensitivity / (2.0 * math.sqrt(rows)),
        )
        spec = PrivacySpec(epsilon=epsilon, delta=delta, unit="sequence")
        entry = MECHANISMS.entry(named("low_rank", rank=rank, seed=self.seed))
        return priced_release(entry, None, spec, problem, 0.0).plan, problem


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")
