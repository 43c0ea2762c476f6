"""The module that keeps less for its backward pass and computes it again there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpfa_attention import functional
from dpfa_attention.module import DPFlashAttention
from dpfa_attention.module_masks import Masks
from dpfa_attention.recomputed_projections import RecomputedProjections
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.tensor_release import tensor_mechanism
from dpfa_attention.terms import Terms
from dpfa_core.checks import integer, require


class DPCheckpointedAttention(DPFlashAttention):
    """``DPFlashAttention`` whose backward pass computes queries, keys and values again, `segments` parts of the batch
    one after the other.

    Only the input and what was released are kept. In setting="release" that matters with upstream_gradients="allow";
    otherwise nothing before the release is kept anyway. A call is one release, charged once, with one noise, however
    often a part is computed. In setting="training" the exact attention of the whole batch is computed again.

    Guarantee: tested (gradients, kept memory, one ledger line, the same noise).
    Args:
        checkpoint_gradients: False keeps everything, as the base does.
        segments: parts that the batch is cut into, at most one for each batch row; more of them use less memory. 1 in
            training, where ``make_private`` cuts batches: max_physical_batch_size.
        Everything else as in ``DPFlashAttention``.
    Raises: PrivacyParameterError, also for noise of one's own: ``add_noise`` may not run twice.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        epsilon: float | None = None,
        delta: float = 1e-5,
        *options: Any,
        checkpoint_gradients: bool = True,
        segments: int = 1,
        **named: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, epsilon, delta, *options, **named)
        require(
            isinstance(checkpoint_gradients, bool), "checkpoint_gradients must be True or False", checkpoint_gradients
        )
        integer("segments", segments, least=1)
        require(
            segments == 1 or self.setting == "release",
            'segments must be 1 in setting="training"',
            segments,
            "make_private cuts batches: max_physical_batch_size.",
        )
        require(
            not checkpoint_gradients or tensor_mechanism(self.noise_mechanism, self.noise_structure) is None,
            "checkpoint_gradients needs a mechanism that plans its noise",
            self.noise_mechanism if isinstance(self.noise_mechanism, str) else type(self.noise_mechanism).__name__,
            "Give checkpoint_gradients=False.",
        )
        self.checkpoint_gradients, self.segments = checkpoint_gradients, segments

    def extra_repr(self) -> str:
        more = f", checkpoint_gradients={self.checkpoint_gradients}, segments={self.segments}"
        return super().extra_repr() + more

    def _attended(self, inputs: list[Tensor], **call: Any) -> tuple[Tensor, PrivacyStats]:
        open_tape = self.upstream_gradients == "allow" and torch.is_grad_enabled()
        if not (self.checkpoint_gradients and open_tape):
            return super()._attended(inputs, **call)
        return self._recomputing(inputs, **call)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is kept is ours to say, not a graph's
    def _recomputing(self, inputs: list[Tensor], **call: Any) -> tuple[Tensor, PrivacyStats]:
        weights, biases = self._input_projections()
        with torch.no_grad():
            q, k, v = self._projected(inputs)

        def compute(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *terms: Any) -> Tensor:
            # a release whose gradient somebody asks for is what check_release_paths looks for
            asking = (x.detach().requires_grad_() for x in (q, k, v))
            made = functional.release(*asking, ticket, *terms).detach()
            out: Tensor = RecomputedProjections.apply(  # type: ignore[no-untyped-call]
                made, *Terms.parted(terms), self.segments, *inputs, *weights, *biases
            )
            return out

        return self._released(q, k, v, compute=compute, **call)

    def _exact(self, inputs: list[Tensor], masks: Masks, *, causal: bool) -> Tensor:
        if not (self.checkpoint_gradients and torch.is_grad_enabled()):
            return super()._exact(inputs, masks, causal=causal)
        out: Tensor = checkpoint(  # type: ignore[no-untyped-call]
            super()._exact, inputs, masks, causal=causal, use_reentrant=False
        )
        return out
