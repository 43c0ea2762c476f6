"""The module: torch's multi-head attention whose output is a release."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpfa_attention.adaptive_clip import largest_norm
from dpfa_attention.functional import released
from dpfa_attention.head_budgets import as_numbers
from dpfa_attention.module_arguments import one_clip, refuse_what_no_call_can_use, shared_by_importance
from dpfa_attention.module_masks import Masks, as_seen, moved_padding, read_masks
from dpfa_attention.module_training import exact_attention, pending
from dpfa_attention.options import resolve
from dpfa_attention.privacy_spent import Calls, PrivacySpent
from dpfa_attention.projection import linear, projected
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.tensor_release import tensor_mechanism
from dpfa_attention.training_engine import guarding_engine, spent_by
from dpfa_attention.upstream_gradients import released_under
from dpfa_core.checks import fraction, integer, one_of, positive, require
from dpfa_core.contracts import TensorMechanism
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_core.plugin_names import named
from dpfa_core.spec import Relation, Unit

EPSILON = 1.0
"""Of a call, where neither epsilon nor head_epsilons were given."""


class DPFlashAttention(nn.Module):
    """Multi-head attention in one of two settings that a call never changes, nor ``train()`` and ``eval()``.

    | setting | forward | what is spent |
    |---|---|---|
    | "release" | clipped and noised; what leaves is (epsilon, delta)-private for one record | at each call |
    | "training" | exact attention | by the engine, at optimiser steps |

    Parameters have the names of ``nn.MultiheadAttention``, so the state of one loads here, and with epsilon inf
    and no clip the outputs are equal. The output projection comes after the release and costs nothing. The input
    projections come before it: their gradients are functions of the records.

    What a release does not cover: what goes around this module (a residual connection, a skip), see
    ``check_release_paths``. For unit="token" the rows of the input must depend on their own token only.

    Guarantee: tested (as ``dp_flash_attn_func``).
    Args:
        embed_dim, num_heads: as in ``nn.MultiheadAttention``; so are `dropout` (training only), `bias`, `kdim` and
            `vdim`. `batch_first` is True here.
        epsilon, delta: of one call; epsilon None is 1.0, or with `head_epsilons` what the list costs in all. In
            training they are not used: ``make_private`` takes the budget.
        max_grad_norm, clip_norm: one number under two names, the clip of a release; in training, none.
        head_epsilons: a number for each head; see ``dp_flash_attn_func``.
        strategy: "importance_based" shares epsilon over the heads by `head_importances`, a public number > 0 for
            each: least noise where it matters most (PRIVACY P6). Beside `head_epsilons`, that list is the sharing.
            None: the same noise in all heads, unless there is a list.
        noise_mechanism: an installed mechanism, an alias, or an object of your own, see ``DPMechanism``.
        upstream_gradients: of a release. None: a backward that goes on to the input projections or the inputs
            raises. "block": it stops, and what comes after the release trains. "allow": it goes on; such
            gradients are not covered and must stay inside.
        private_diagnostics: put into the stats of a release what is private: `grad_norm`, the largest L2 norm of a
            value row before the clip, a function of the records without noise.
        ledger: where calls are charged; None is ``process_ledger(unit, relation)``, which all modules share.
        unit, queries, relation, clip, logit_bound, causal, window_size, noise_structure, allow_infinite_heads,
            backend, seed: as in ``dp_flash_attn_func``.
    Raises: PrivacyParameterError for anything that no call could use.
    """

    # torch's encoder layers skip a module's forward, and with it the noise, where this says that they can
    _qkv_same_embed_dim = False

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        epsilon: float | None = None,
        delta: float = 1e-5,
        max_grad_norm: float | None = None,
        head_epsilons: Sequence[float] | None = None,
        strategy: Literal["importance_based"] | None = None,
        noise_mechanism: str | TensorMechanism = "gaussian",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        head_importances: Sequence[float] | None = None,
        setting: Literal["release", "training"] = "release",
        unit: Unit = "sequence",
        queries: Literal["public", "private"] = "private",
        relation: Relation = "replace",
        clip_norm: float | None = None,
        clip: Literal["value", "output"] = "value",
        logit_bound: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        noise_structure: str | None = None,
        allow_infinite_heads: bool = False,
        upstream_gradients: Literal["block", "allow"] | None = None,
        private_diagnostics: bool = False,
        dropout: float = 0.0,
        batch_first: bool = True,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        ledger: Ledger | None = None,
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        integer("embed_dim", embed_dim, least=1)
        integer("num_heads", num_heads, least=1)
        require(embed_dim % num_heads == 0, f"embed_dim must be a multiple of num_heads={num_heads}", embed_dim)
        one_of("setting", setting, ("release", "training"))
        one_of("upstream_gradients", upstream_gradients, (None, "block", "allow"))
        fraction("dropout", dropout)
        one_of("strategy", strategy, (None, "importance_based"))
        self.head_epsilons = as_numbers(head_epsilons)
        if epsilon is None:
            epsilon = EPSILON if self.head_epsilons is None else math.inf
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.epsilon, self.delta, self.setting, self.unit, self.relation = epsilon, delta, setting, unit, relation
        self.queries, self.clip, self.logit_bound = queries, clip, logit_bound
        self.clip_norm = one_clip(max_grad_norm, clip_norm)
        self.causal, self.window_size, self.dropout, self.batch_first = causal, tuple(window_size), dropout, batch_first
        self.noise_mechanism, self.noise_structure = noise_mechanism, noise_structure
        self.noise_multiplier: float | None = None
        self.strategy, self.head_importances = strategy, as_numbers(head_importances)
        self.allow_infinite_heads, self.private_diagnostics = allow_infinite_heads, private_diagnostics
        self.upstream_gradients, self.backend, self.seed = upstream_gradients, backend, seed
        self.head_epsilons = shared_by_importance(
            self.head_importances,
            strategy=strategy,
            head_epsilons=self.head_epsilons,
            epsilon=epsilon,
            delta=delta,
            heads=num_heads,
            mechanism=self._mechanism_and_accountant()[0],
        )
        refuse_what_no_call_can_use(self)
        self._calls = Calls(ledger, unit, relation)
        self._forwards = 0

        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns, **factory)))

        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = weight(3 * embed_dim, embed_dim)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = weight(embed_dim, embed_dim)
            self.k_proj_weight = weight(embed_dim, self.kdim)
            self.v_proj_weight = weight(embed_dim, self.vdim)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(3 * embed_dim, **factory)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        return_privacy_stats: bool = False,
    ) -> Tensor | tuple[Tensor, PrivacyStats] | tuple[Tensor, None]:
        """One release, or in training exact attention.

        Args:
            query, key, value: [B, S, E], or [S, B, E] without batch_first, or [S, E]; `query` alone is
                self-attention.
            key_padding_mask: [B, Sk]; True, -inf or <= -1e4 hides a key, and padding is at the end. In causal
                self-attention and under a window the queries of padding see nothing.
            attn_mask: [S, Sk] or [B * H, S, Sk]; True hides, as in ``nn.MultiheadAttention``: any pattern that is the
                same for every batch row and head, or the end of each. Other numbers of a
                floating-point mask are a public bias of the logits, added before they are bounded: no noise changes,
                and a mask that requires a gradient is refused in a release.
            need_weights: True is refused. False, as torch's layers ask, returns (out, None).
            average_attn_weights: accepted; there are no weights.
            is_causal: aligned bottom-right, and beside an attn_mask, both hide.
        Returns: out; (out, PrivacyStats) with return_privacy_stats; (out, None) with need_weights=False.
        Raises: NotPrivateError for weights, or training outside an engine; as ``dp_flash_attn_func``.
        """
        if need_weights:
            raise NotPrivateError(
                "need_weights must be False, got True: attention weights are functions of the records that leave "
                "without noise; compute them apart, outside what is promised."
            )
        require(
            (key is None) == (value is None), "key and value must be given together", "one of them", "Or give neither."
        )
        own = key is None or (key is query and value is query)
        inputs = [self._batched(name, x) for name, x in self._named(query, key, value)]
        if key_padding_mask is not None and query.dim() == 2:
            key_padding_mask = key_padding_mask[None]
        masks = read_masks(
            attn_mask,
            key_padding_mask,
            shape=(inputs[0].shape[0], inputs[0].shape[1], inputs[1].shape[1]),
            heads=self.num_heads,
            gradient=self.setting == "training",
        )
        run = self._train if self.setting == "training" else self._release
        out, stats = run(inputs, masks, causal=self.causal or is_causal, own=own)
        self._forwards += 1
        if query.dim() == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if return_privacy_stats:
            return out, stats
        return out if need_weights is None else (out, None)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """What the calls of this module cost together since the last reset; in training, what its engine spent.

        A record that also meets other modules loses what their calls cost besides: `ledger_epsilon`.

        Args: `delta` to answer at; None is the ledger's own, or else that of one call.
        Raises: NotPrivateError in training without an engine.
        """
        if self.setting == "training":
            return spent_by(guarding_engine(self.parameters()), delta, self.delta, self._forwards)
        calls = self._calls
        at = next(x for x in (delta, calls.ledger.delta, self.delta) if x is not None)
        return calls.spent(at, *self._mechanism_and_accountant())

    def reset_privacy_accounting(self, reason: str | None = None) -> None:
        """Count the next calls from zero, because they are about other records; `reason` says so.

        The ledger keeps every line, its budget goes on, and `lifetime_epsilon` keeps the total.

        Raises: PrivacyParameterError without a reason.
        """
        self._calls.new_period(reason or "")

    @property
    def period_reasons(self) -> tuple[str, ...]:
        """Why each accounting period but the first was opened."""
        return tuple(self._calls.reasons)

    def set_noise_multiplier(self, noise_multiplier: float | None) -> None:
        """Use this much noise from the next call on, in the place of what epsilon asks for; None calibrates again.

        A call then costs what its noise costs: `epsilon_spent`, the ledger and its budget go by that, and no longer
        by the epsilon that the module was built with.

        Args: std of the noise / sensitivity, with `head_epsilons` of all heads together.
        Raises: PrivacyParameterError.
        """
        if noise_multiplier is not None:
            positive("noise_multiplier", noise_multiplier, remedy="A release without noise has epsilon=inf.")
        require(self.setting == "release", 'a noise multiplier belongs to setting="release"', self.setting)
        require(
            noise_multiplier is None or isinstance(self.noise_mechanism, str),
            "a noise multiplier needs an installed mechanism that plans its noise",
            type(self.noise_mechanism).__name__,
        )
        self.noise_multiplier = None if noise_multiplier is None else float(noise_multiplier)

    def set_clip_norm(self, clip_norm: float) -> None:
        """Use another clip from the next call on; epsilon stays, and the noise follows the clip."""
        positive("clip_norm", clip_norm)
        require(self.setting == "release", 'a clip belongs to setting="release"', self.setting)
        self.clip_norm = float(clip_norm)

    def extra_repr(self) -> str:
        promise = f"epsilon={self.epsilon}, delta={self.delta}, unit={self.unit!r}, setting={self.setting!r}"
        if self.noise_multiplier is not None:
            promise = f"noise_multiplier={self.noise_multiplier}, " + promise.replace("epsilon", "built with epsilon")
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {promise}"

    # ---- release

    def _release(self, inputs: list[Tensor], masks: Masks, *, causal: bool, own: bool) -> tuple[Tensor, PrivacyStats]:
        moved = moved_padding(masks, causal=causal, window=self._window(), own=own)
        if moved is not None:
            rows, causal = moved
            out, stats = self._attended(list(rows.packed(*inputs)), causal=causal, lengths=rows.lengths)
            out = rows.unpacked(out)
        else:
            shown = as_seen(masks, heads=self.num_heads, causal=causal, window=self._window(), own=own)
            out, stats = self._attended(inputs, **shown._asdict(), bias=masks.bias)
        return linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), stats

    def _attended(self, inputs: list[Tensor], **call: Any) -> tuple[Tensor, PrivacyStats]:
        """What leaves, [B, S, H, D], with the tape that `upstream_gradients` allows."""
        release = partial(self._released, **call)
        return released_under(self.upstream_gradients, release, *self._projected(inputs))

    def _projected(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, S, H, D] of query, key and value."""
        return projected(inputs, *self._input_projections(), self.num_heads)

    def _released(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, lengths: tuple[tuple[int, int], ...], **more: Any
    ) -> tuple[Tensor, PrivacyStats]:
        """What leaves, [B, S, H, D]; noted among the calls of this module."""
        asked = self._asked() | more
        out, stats = released(q, k, v, causal=causal, return_privacy_stats=True, lengths=lengths, **asked)
        self._calls.add(stats.event_id)
        if self.private_diagnostics:
            stats = dataclasses.replace(stats, grad_norm=largest_norm(v, lengths))
        return out, stats

    def _asked(self) -> dict[str, Any]:
        """The arguments of ``released`` that are the same for every call."""
        mechanism, epsilon = self.noise_mechanism, self.epsilon
        if self.noise_multiplier is not None:
            assert isinstance(mechanism, str)  # noqa: S101  (checked where it was set)
            # the call costs what its noise costs, however much
            mechanism, epsilon = named(mechanism, noise_multiplier=self.noise_multiplier), sys.float_info.max
        more: dict[str, Any] = {}
        if self.head_epsilons is not None:
            more |= {"head_epsilons": self.head_epsilons, "allow_infinite_heads": self.allow_infinite_heads}
        if self.noise_structure is not None:
            more["noise_structure"] = self.noise_structure
        return more | {
            "window_size": self._window(),
            "epsilon": epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "relation": self.relation,
            "queries": self.queries,
            "clip_norm": self.clip_norm,
            "clip": self.clip,
            "logit_bound": self.logit_bound,
            "mechanism": mechanism,
            "backend": self.backend,
            "seed": self.seed,
            "ledger": self._calls.given,
        }

    def _input_projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(weights, biases) of query, key and value."""
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        return weights, (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

    # ---- training

    def _train(self, inputs: list[Tensor], masks: Masks, *, causal: bool, own: bool) -> tuple[Tensor, PrivacyStats]:
        stats = pending(self)
        return self._exact(inputs, masks, causal=causal), stats

    def _exact(self, inputs: list[Tensor], masks: Masks, *, causal: bool) -> Tensor:
        """[B, S, E]."""
        return exact_attention(self, inputs, masks, causal=causal)

    # ---- arguments

    def _mechanism_and_accountant(self) -> tuple[str, str | None]:
        found = tensor_mechanism(self.noise_mechanism, self.noise_structure)
        if found is not None:
            return found[0].name, None
        assert isinstance(self.noise_mechanism, str)  # noqa: S101  (an object is one that works on tensors)
        return resolve(self.noise_mechanism, self.noise_structure)

    def _window(self) -> tuple[int, int]:
        return self.window_size[0], self.window_size[1]

    def _named(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[tuple[str, Tensor], ...]:
        return (
            ("query", query),
            ("key", query if key is None else key),
            ("value", query if value is None else value),
        )

    def _batched(self, name: str, x: Tensor) -> Tensor:
        """[B, S, width]."""
        width = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}[name]
        require(
            isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[-1] == width and not x.is_nested,
            f"{name} must be a tensor [batch, length, {width}]",
            list(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__,
        )
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)
