"""What is promised and what is computed: frozen, hashable, without tensors.

All names and meanings are part of the plugin contract; see docs/reference/contract.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpfa_core.checks import a_tuple, fraction, integer, is_real, non_negative, one_of, positive, require
from dpfa_core.records import Record

CONTRACT_VERSION = 1
"""A plugin states ``contract_version = 1``; any other number is a load error."""

Tensor = Any
Reasons = tuple[str, ...]
"""Reasons *against*, one sentence each; empty means yes."""
Unit = Literal["sequence", "token", "example", "user"]
Relation = Literal["add_or_remove", "replace"]
Norm = Literal["l1", "l2", "whitened_l2"]
Guarantee = Literal["proved", "tested", "assumed"]

UNITS = ("sequence", "token", "example", "user")
RELATIONS = ("add_or_remove", "replace")
NORMS = ("l1", "l2", "whitened_l2")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class PrivacySpec(Record):
    """What is promised: (epsilon, delta) for one unit under one neighbouring relation."""

    epsilon: float
    """> 0; ``inf`` means no noise and is never called private."""
    delta: float
    unit: Unit
    relation: Relation = "replace"
    queries: Literal["public", "private"] | None = None

    def __post_init__(self) -> None:
        positive("epsilon", self.epsilon, finite=False, remedy="Use inf only for a run without privacy.")
        fraction("delta", self.delta)
        one_of("unit", self.unit, UNITS)
        one_of("relation", self.relation, RELATIONS)
        one_of("queries", self.queries, ("public", "private", None))
        if self.unit == "token":
            require(
                self.queries is not None,
                'unit="token" needs queries="public" or "private"',
                self.queries,
                'Choose "private" unless the queries hold no part of the record.',
            )


@dataclass(frozen=True, kw_only=True)
class AttentionProblem(Record):
    """The attention that is released; shapes, lengths and masks are public."""

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[tuple[int, int], ...] = ()
    """(queries, keys) of each batch row; empty means that all rows are full."""
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    """Keys left and right of the diagonal, -1 is unlimited; aligned bottom-right."""
    mask: bytes | None = None
    """Any other mask, the same for the whole batch: row-major bits [q_len][kv_len], 1 = visible, the most
    significant bit of each byte first (``numpy.packbits``). What causal, window or lengths hide stays hidden."""
    clip: Literal["value", "output"] = "value"
    clip_norm: float | None = None
    logit_bound: float | None = None
    dtype: str = "float32"
    device: str = "cpu"
    biased: bool = False
    """Finite public numbers are added to the logits, before the bound; a backend is given them beside q, k and v."""

    def __post_init__(self) -> None:
        for name in ("batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim"):
            integer(name, getattr(self, name), least=1)
        require(
            self.q_heads % self.kv_heads == 0,
            f"q_heads must be a multiple of kv_heads={self.kv_heads}",
            self.q_heads,
        )
        a_tuple("lengths", self.lengths)
        require(
            len(self.lengths) in (0, self.batch),
            f"lengths must be empty or hold one pair for each of the {self.batch} batch rows",
            self.lengths,
        )
        for pair in self.lengths:
            good = isinstance(pair, tuple) and len(pair) == 2
            require(good, "each of lengths must be a tuple (queries, keys)", pair)
            integer("a query length", pair[0], least=0)
            integer("a key length", pair[1], least=0)
            require(
                pair[0] <= self.q_len and pair[1] <= self.kv_len,
                f"a pair of lengths must not exceed (q_len, kv_len) = ({self.q_len}, {self.kv_len})",
                pair,
            )
        good = isinstance(self.window, tuple) and len(self.window) == 2
        require(good, "window must be a tuple (left, right)", self.window)
        for side in self.window:
            integer("a window side", side, least=-1)
        if self.mask is not None:
            size = -(-self.q_len * self.kv_len // 8)
            require(isinstance(self.mask, bytes), "mask must be bytes", type(self.mask).__name__)
            require(len(self.mask) == size, f"mask must hold {size} bytes of packed bits", len(self.mask))
        one_of("clip", self.clip, ("value", "output"))
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm, remedy="None means no clip.")
        if self.logit_bound is not None:
            positive("logit_bound", self.logit_bound, remedy="None means no bound.")
        one_of("dtype", self.dtype, DTYPES)
        require(isinstance(self.biased, bool), "biased must be True or False", self.biased)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Record):
    """How far one record moves the released rows, and which theorem says so."""

    norm: Norm
    value: float
    naive: float
    item: str
    row_bound: tuple[float, ...] = ()
    """Bound of one row of one head, indexed by its number of visible keys."""
    worst_key: int | None = None

    def __post_init__(self) -> None:
        one_of("norm", self.norm, NORMS)
        non_negative("value", self.value)
        non_negative("naive", self.naive)
        a_tuple("row_bound", self.row_bound)


@dataclass(frozen=True, kw_only=True)
class Structure(Record):
    """A public noise structure; its tensors are made from `seed` once, never by a backend."""

    kind: Literal["low_rank", "sparse", "block_diagonal"]
    parameters: tuple[tuple[str, float], ...]
    seed: int

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ("low_rank", "sparse", "block_diagonal"))
        a_tuple("parameters", self.parameters)
        integer("seed", self.seed, least=0)


@dataclass(frozen=True, kw_only=True)
class NoisePlan(Record):
    """All a backend needs: ``scale(row i, head h) = head_scale[h] * row_scale[n_i]``."""

    mechanism: str
    distribution: Literal["none", "gaussian", "laplace", "discrete_gaussian", "custom"]
    head_scale: tuple[float, ...]
    """Length 1 or q_heads, in output units, rounded up; Gaussian: std, Laplace: b."""
    row_scale: tuple[float, ...] = (1.0,)
    """Length 1 or kv_len + 1, indexed by n_i, the number of keys visible to row i."""
    norm: Norm = "l2"
    structure: Structure | None = None
    grid: float = 0.0
    transform: Literal["bm32", "bm64"] = "bm32"
    noiseless_heads: bool = False
    """Zeros in head_scale are meant: these heads are released as they are, and the whole has no finite epsilon."""

    def __post_init__(self) -> None:
        one_of("distribution", self.distribution, ("none", "gaussian", "laplace", "discrete_gaussian", "custom"))
        for name in ("head_scale", "row_scale"):
            values = getattr(self, name)
            a_tuple(name, values)
            require(len(values) > 0, f"{name} must hold at least one number", values)
            for value in values:
                non_negative(f"each entry of {name}", value)
        noiseless = self.distribution == "none"
        require(
            not noiseless or not any(self.head_scale),
            'head_scale must be 0 where distribution="none"',
            self.head_scale,
        )
        require(isinstance(self.noiseless_heads, bool), "noiseless_heads must be True or False", self.noiseless_heads)
        require(
            noiseless or all(self.head_scale) or (self.noiseless_heads and any(self.head_scale)),
            "head_scale must be > 0 for at least one head"
            if self.noiseless_heads
            else "head_scale must be > 0 wherever there is noise",
            self.head_scale,
            'Use distribution="none" for a call that is not private.',
        )
        require(
            noiseless or any(self.row_scale),
            "row_scale must be > 0 for some rows wherever there is noise",
            self.row_scale,
        )
        one_of("norm", self.norm, NORMS)
        non_negative("grid", self.grid)
        one_of("transform", self.transform, ("bm32", "bm64"))


@dataclass(frozen=True)
class Claim(Record):
    """An obligation that the verifier must discharge; numbers are decimal strings."""

    obligation: str
    parameters: tuple[tuple[str, str], ...] = ()
    status: Guarantee = "assumed"
    source: str = ""

    def __post_init__(self) -> None:
        require(bool(self.obligation), "obligation must be a name", self.obligation)
        one_of("status", self.status, ("proved", "tested", "assumed"))
        a_tuple("parameters", self.parameters)
        for name, number in self.parameters:
            require(
                isinstance(name, str) and isinstance(number, str) and _is_decimal(number),
                "a claim's parameters must be pairs (name, decimal string)",
                (name, number),
            )


def _is_decimal(text: str) -> bool:
    try:
        return is_real(float(text))
    except ValueError:
        return False
