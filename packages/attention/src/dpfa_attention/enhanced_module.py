"""The module with everything that research asks of it: structures, adaptive clips, analyses, timers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from dpfa_attention import functional
from dpfa_attention.adaptive_clip import Moved, shares
from dpfa_attention.checkpointed_module import DPCheckpointedAttention
from dpfa_attention.default_ledger import ledger_numbered, number_and_delta
from dpfa_attention.enhanced_arguments import (
    accountant_named,
    one_mechanism,
    refuse_noise_site,
    refuse_unknown,
    structured,
)
from dpfa_attention.forward_timer import ForwardTimer, megabytes
from dpfa_attention.options import resolve
from dpfa_attention.privacy_analysis import configuration, features, norm_of, sensitivity_of, spec_of
from dpfa_attention.problem import attention_problem
from dpfa_attention.projection import projected
from dpfa_attention.score_noise import attention_of_noised_scores
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import require
from dpfa_core.contracts import TensorMechanism
from dpfa_core.events import DiscreteGaussian
from dpfa_core.plugin_names import parts
from dpfa_core.registry import ACCOUNTANTS
from dpfa_core.spec import AttentionProblem, Unit

COUNT = DiscreteGaussian(1.0)
"""What an accountant has to price where the clip adapts."""

LOGIT_BOUND = 1.0
"""Where attention_aware noise chose unit="token" and nobody gave a bound."""


class EnhancedDPFlashAttention(DPCheckpointedAttention):
    """``DPFlashAttention`` with noise structures by parameters, a clip that adapts privately, analyses and timers.

    Guarantee: tested (as ``dp_flash_attn_func``; with adaptive noise the count and the release together cost at most
    epsilon and delta).
    Args:
        embed_dim ... dtype: as in ``DPFlashAttention``, and so is every option that is not listed here.
        privacy_mechanism, mechanism, noise_mechanism: one thing under three names; without any it is "pld".
        noise_structure: "low_rank" with `rank` (16), "sparse" with `sparsity` (0.9), "block_diagonal" with `block_size`
            (32), "attention_aware"; see ``dp_flash_attn_func``.
        composition_method: the accountant of ``get_privacy_spent``, "pld", "renyi" or another installed one; None is
            that of the mechanism's alias, or else the least valid bound. Of these "pld", "prv" and "gdp" have no bound
            for the counts of adaptive noise: with them the least valid bound answers, and the report names whose it is.
        sensitivity_analysis: keep the public bounds of the last call's shape, per head and per component, for
            ``export_privacy_analysis``. The noise goes by the exact public bound in any case.
        adaptive_noise: spend a tenth of each call's epsilon and delta on a noisy count that moves the clip norm towards
            the median of the records' norms, by a tenth at most, before the release; the noise follows the
            clip. Without it both are constant.
        dropout: on the weights, in training; a release refuses it.
        noise_site: "scores" puts the noise on the bounded scores, of which the values are no part: such a call costs an
            infinite epsilon unless values="public" declares that they hold no part of a record. It needs a
            `logit_bound`, unit="sequence" and Gaussian noise without structure.
        compile_kernels: the projections run through ``torch.compile``; the release is an operator that a compiler
            leaves as it is. Of a release only.
        checkpoint_gradients, segments: as in ``DPCheckpointedAttention``.
        unit: None is "token" for attention_aware noise, and "sequence" otherwise.
        logit_bound: None is 1.0 where attention_aware noise chose the unit, and no bound otherwise.
    Raises: PrivacyParameterError for anything that no call could use; TypeError for an unknown option.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        epsilon: float | None = None,
        delta: float = 1e-5,
        max_grad_norm: float | None = None,
        head_epsilons: Sequence[float] | None = None,
        strategy: Literal["importance_based"] | None = None,
        noise_mechanism: str | TensorMechanism | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        privacy_mechanism: str | TensorMechanism | None = None,
        mechanism: str | TensorMechanism | None = None,
        noise_structure: str | None = None,
        rank: int | None = None,
        sparsity: float | None = None,
        block_size: int | None = None,
        composition_method: str | None = None,
        sensitivity_analysis: bool = True,
        adaptive_noise: bool = False,
        dropout: float = 0.0,
        noise_site: Literal["output", "scores"] = "output",
        values: Literal["public", "private"] = "private",
        compile_kernels: bool = False,
        checkpoint_gradients: bool = False,
        segments: int = 1,
        unit: Unit | None = None,
        logit_bound: float | None = None,
        **options: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, options, EnhancedDPFlashAttention.__init__)
        chosen = one_mechanism(
            privacy_mechanism=privacy_mechanism, mechanism=mechanism, noise_mechanism=noise_mechanism
        )
        wide = isinstance(embed_dim, int) and isinstance(num_heads, int) and num_heads > 0
        structure = structured(
            chosen,
            noise_structure,
            embed_dim // num_heads if wide else 1,
            rank=rank,
            sparsity=sparsity,
            block_size=block_size,
        )
        if unit is None:
            aware = isinstance(chosen, str) and parts(resolve(chosen, structure)[0])[0] == "attention_aware"
            unit = "token" if aware else "sequence"
            if aware and logit_bound is None:
                logit_bound = LOGIT_BOUND
        self._accountant = accountant_named(composition_method)
        super().__init__(
            embed_dim,
            num_heads,
            epsilon,
            delta,
            max_grad_norm,
            head_epsilons,
            strategy,
            chosen,
            device,
            dtype,
            noise_structure=structure,
            dropout=dropout,
            checkpoint_gradients=checkpoint_gradients,
            segments=segments,
            unit=unit,
            logit_bound=logit_bound,
            **options,
        )
        require(
            not compile_kernels or self.setting == "release",
            'compile_kernels must be False in setting="training"',
            compile_kernels,
            "Compile the model there.",
        )
        self.noise_site, self.values = noise_site, values
        refuse_noise_site(self)
        self.composition_method, self.compile_kernels = composition_method, compile_kernels
        self.sensitivity_analysis = sensitivity_analysis
        self._init_research_components()
        self.enable_adaptive_noise(adaptive_noise)

    def _init_research_components(self) -> None:
        """What the base has not: timers, the last call's shape, the path of the clip. Once, by the constructor."""
        self._timer = ForwardTimer()
        self._last_problem: AttentionProblem | None = None
        self._clip_path: list[float] = []

    def forward(self, query: Tensor, *arguments: Any, **named: Any) -> Any:
        """As ``DPFlashAttention.forward``, and timed."""
        if torch.compiler.is_compiling() or not isinstance(query, Tensor):
            return super().forward(query, *arguments, **named)
        with self._timer.measuring(query.device):
            return super().forward(query, *arguments, **named)

    def enable_adaptive_noise(self, enabled: bool = True) -> None:
        """Let the clip norm follow the records from the next call on, or stay where it is.

        Raises: PrivacyParameterError where there is no budget of a call to share.
        """
        require(isinstance(enabled, bool), "enabled must be True or False", enabled)
        require(
            not enabled or self.noise_site == "output",
            "adaptive noise moves the clip of values, so noise_site must be 'output'",
            self.noise_site,
        )
        require(not enabled or self.setting == "release", 'adaptive noise belongs to setting="release"', self.setting)
        require(
            not enabled or (math.isfinite(self.epsilon) and self.delta > 0),
            "adaptive noise needs a finite epsilon and a delta > 0, of which the count has a share",
            (self.epsilon, self.delta),
            "With head_epsilons give epsilon as well.",
        )
        self.adaptive_noise = enabled

    def get_performance_stats(self) -> dict[str, Any]:
        """How the forward passes went; not private, and nothing that leaves with a release.

        | key | meaning |
        |---|---|
        | forward_pass.avg_time | milliseconds of one pass, by a clock; 0 before the first |
        | forward_pass.calls | passes |
        | memory_usage | 10**6 bytes, the most so far: allocated on a GPU, else resident in the process |
        """
        return {
            "forward_pass": {"avg_time": self._timer.milliseconds, "calls": self._timer.calls},
            "memory_usage": megabytes(self.out_proj.weight.device),
        }

    def export_privacy_analysis(self) -> dict[str, Any]:
        """All that can be said of this module, ready for ``json.dump``; but for the timers, of public and paid things.

        | key | meaning |
        |---|---|
        | configuration | the promise of a call, and how it is kept |
        | privacy_spent | ``get_privacy_spent()`` |
        | research_features | whether PLD, noise structures and a sensitivity bound can be had here |
        | performance_stats | ``get_performance_stats()`` |
        | sensitivity | ``AttentionSensitivityAnalyzer`` at the last call's shape; None if off or of scores |
        | clip_norm_path | the clip norm after each private count |
        """
        more = ("noise_site", "values", "composition_method", "sensitivity_analysis", "adaptive_noise")
        return {
            "configuration": configuration(self, *more),
            "privacy_spent": dict(self.get_privacy_spent()),
            "research_features": features(self),
            "performance_stats": self.get_performance_stats(),
            "sensitivity": sensitivity_of(self, self._last_problem),
            "clip_norm_path": list(self._clip_path),
        }

    def _mechanism_and_accountant(self) -> tuple[str, str | None]:
        name, accountant = super()._mechanism_and_accountant()
        accountant = self._accountant or accountant
        if accountant and self.__dict__.get("_clip_path") and ACCOUNTANTS.create(accountant).supports(COUNT):
            return name, None
        return name, accountant

    # ---- release

    def _projected(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if not self.compile_kernels:
            return super()._projected(inputs)
        return _compiled_projections()(inputs, *self._input_projections(), self.num_heads)  # type: ignore[no-any-return]

    def _released(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, lengths: tuple[tuple[int, int], ...], **more: Any
    ) -> tuple[Tensor, PrivacyStats]:
        if self.noise_site == "scores":
            return self._of_noised_scores(q, k, v, causal=causal, lengths=lengths, **more)
        if self.sensitivity_analysis:
            self._last_problem = attention_problem(
                q,
                k,
                v,
                causal=causal,
                window=self._window(),
                clip=self.clip,
                clip_norm=1.0,
                logit_bound=self.logit_bound,
                lengths=lengths,
                mask=more.get("mask"),
            )
        if not self.adaptive_noise:
            return super()._released(q, k, v, causal=causal, lengths=lengths, **more)
        (epsilon, delta), rest = shares(self.epsilon, self.delta)
        moved = functional.moved_clip(
            v.detach(),
            lengths,
            self.clip_norm or 1.0,
            unit=self.unit,
            norm=norm_of(self),
            epsilon=epsilon,
            delta=delta,
            ledger=ledger_numbered(number_and_delta(self._calls.given)[0], spec_of(self)),
        )
        self.clip_norm = moved.clip_norm
        self._clip_path.append(moved.clip_norm)
        if moved.event_id:  # none in a check of release paths
            self._calls.add_beside(moved.event_id)
        if self.noise_multiplier is None:
            more["epsilon"] = rest[0]
        out, stats = super()._released(q, k, v, causal=causal, lengths=lengths, delta=rest[1], **more)
        return out, self._of_both(stats, moved)

    def _of_noised_scores(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> tuple[Tensor, PrivacyStats]:
        asked = self._asked()
        out, stats = attention_of_noised_scores(
            q,
            k,
            v,
            dataclasses.replace(spec_of(self), epsilon=asked["epsilon"]),
            values=self.values,
            logit_bound=asked["logit_bound"],
            mechanism=asked["mechanism"],
            window_size=asked["window_size"],
            backend=self.backend,
            seed=self.seed,
            ledger=number_and_delta(self._calls.given)[0],
            **call,
        )
        self._calls.add(stats.event_id)
        return out, stats

    def _of_both(self, stats: PrivacyStats, moved: Moved) -> PrivacyStats:
        together = math.nextafter(stats.epsilon_spent + moved.epsilon, math.inf)
        if self.noise_multiplier is None and math.isfinite(together):
            together = min(together, self.epsilon)
        return dataclasses.replace(stats, epsilon_spent=together, delta=self.delta)


def create_enhanced_dp_flash_attention(
    embed_dim: int,
    num_heads: int,
    epsilon: float | None = None,
    delta: float = 1e-5,
    mechanism: str | TensorMechanism | None = None,
    noise_structure: str | None = None,
    sensitivity_analysis: bool = True,
    composition_method: str | None = None,
    **options: Any,
) -> EnhancedDPFlashAttention:
    """An ``EnhancedDPFlashAttention``; arguments, guarantee and errors are its own."""
    return EnhancedDPFlashAttention(
        embed_dim,
        num_heads,
        epsilon,
        delta,
        mechanism=mechanism,
        noise_structure=noise_structure,
        sensitivity_analysis=sensitivity_analysis,
        composition_method=composition_method,
        **options,
    )


@cache
def _compiled_projections() -> Any:
    return torch.compile(projected, dynamic=True)
