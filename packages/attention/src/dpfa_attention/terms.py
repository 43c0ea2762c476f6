"""What a call asks for, as values that a traced graph can hold, and what follows from them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpfa_attention.head_budgets import as_numbers
from dpfa_attention.options import bound_of_logits, resolve, scale_of_logits
from dpfa_attention.pricing import PricedRelease, noiseless_release, priced_release
from dpfa_attention.problem import attention_problem, packed_mask
from dpfa_core import selection
from dpfa_core.checks import integer, one_of
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import AttentionProblem, PrivacySpec

SCHEMA = (
    "float? softmax_scale, bool causal, SymInt[] window_size, float softcap, float epsilon, float delta, str unit, "
    "str relation, str? queries, float? clip_norm, str clip, float? logit_bound, str mechanism, "
    "str? noise_structure, float[]? head_epsilons, bool allow_infinite_heads, str backend, SymInt? seed, "
    "SymInt ledger, float ledger_delta, SymInt[] lengths, str? mask"
)
"""``Terms`` in the language of operators; a public bias of the logits may come behind them."""


class Terms(NamedTuple):
    """The arguments of ``dp_flash_attn_func`` that are not tensors, as they were given."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    epsilon: float
    delta: float
    unit: Any
    relation: Any
    queries: Any
    clip_norm: float | None
    clip: Any
    logit_bound: float | None
    mechanism: str
    noise_structure: str | None
    head_epsilons: Any
    allow_infinite_heads: bool
    backend: str
    seed: int | None
    ledger: int
    """The ledger's number; 0 is the process's own."""
    ledger_delta: float
    """At which the ledger adds up; 0 where it does not say."""
    lengths: tuple[int, ...]
    """Queries, keys, queries, keys ... of each batch row; empty where all are full."""
    mask: str | None = None
    """Hexadecimal digits of ``AttentionProblem.mask``; see ``bits``."""

    @classmethod
    def parted(cls, values: tuple[Any, ...]) -> tuple[Terms, Tensor | None]:
        """Terms, and the bias where one came behind them; see ``of_operator``."""
        count = len(cls._fields)
        return cls.of_operator(values[:count]), values[count] if len(values) > count else None

    @classmethod
    def of_operator(cls, values: tuple[Any, ...]) -> Terms:
        """From an operator's arguments, which come as lists where a graph holds several numbers."""
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph has the digits as a constant
def bits(mask: Tensor) -> str:
    """A public mask, bool [S, Sk], as ``Terms`` hold it."""
    return packed_mask(mask, *mask.shape).hex()


class Agreed(NamedTuple):
    """All that is known before a tensor is read."""

    spec: PrivacySpec
    problem: AttentionProblem
    priced: PricedRelease
    backend: str
    softmax_scale: float


def agreed(q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None = None) -> Agreed:
    """The release that `terms` ask for, of tensors like these: a function of shapes and terms alone.

    Raises: what ``dp_flash_attn_func`` lists, but for the ledger's part.
    """
    spec = PrivacySpec(
        epsilon=terms.epsilon, delta=terms.delta, unit=terms.unit, relation=terms.relation, queries=terms.queries
    )
    one_of("unit", spec.unit, ("sequence", "token"), "Examples and users are units of training.")
    head_budget = as_numbers(terms.head_epsilons)
    private = not math.isinf(spec.epsilon) or head_budget is not None
    problem = attention_problem(
        q,
        k,
        v,
        causal=terms.causal,
        window=terms.window_size,
        clip=terms.clip,
        clip_norm=1.0 if private and terms.clip_norm is None else terms.clip_norm,
        logit_bound=bound_of_logits(terms.softcap, terms.logit_bound),
        lengths=tuple(zip(terms.lengths[::2], terms.lengths[1::2], strict=True)),
        mask=None if terms.mask is None else bytes.fromhex(terms.mask),
        biased=bias is not None,
    )
    if terms.seed is not None:
        integer("seed", terms.seed, least=0, remedy="None draws a secret from the operating system.")
    scale = scale_of_logits(terms.softmax_scale, problem.head_dim)
    name, accountant = resolve(terms.mechanism, terms.noise_structure)
    entry = MECHANISMS.entry(name)
    if private:
        priced = priced_release(
            entry, accountant, spec, problem, terms.ledger_delta, head_budget, terms.allow_infinite_heads
        )
    else:
        priced = noiseless_release(entry, problem)
    return Agreed(spec, problem, priced, selection.select("release", problem, priced.plan, terms.backend).name, scale)
