"""A memory of private records that strangers may ask, until its budget is spent."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfa_attention.functional import dp_flash_attn_func
from dpfa_attention.memory_file import read_memory, safetensors, write_memory
from dpfa_attention.problem import DTYPES
from dpfa_attention.receipts import Receipts
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import integer, is_real, positive, require
from dpfa_core.errors import LedgerError
from dpfa_core.ledger import Ledger


class PrivateMemory:
    """Keys and values of private records, answered by attention whose output is noised and charged.

    | what | is |
    |---|---|
    | one record (unit="token") | one key and one value row in every key head: one document, one prompt token |
    | the queries | public: whoever asks is outside, and may choose each query after seeing all answers so far |
    | relation "replace" | one record is another one; how many there are is public |
    | relation "add_or_remove" | one record is there or not: `capacity` places are always attended, empty ones as null |
    | one call | one release; all its queries together cost (epsilon, delta), and the noise grows with their root |
    | many calls | compose in the ledger; a call that would exceed its budget is refused before anything is computed |

    What the guarantee does not cover: a person with several records (the unit is one record); keys and values that
    depend on other records, as contextual embeddings of one long prompt or a projection fitted on the memory do;
    what the owner does with ``len()``, errors of ``append`` and the file; how long an answer takes.

    Noise is Gaussian, for which a limit on adaptively chosen calls is exact (a filter on the sum of the squared mu);
    where calls differ in their number of queries, the end of the noise sampler may add up once more than is charged,
    at most 1/16 of each call's delta.

    Guarantee: tested (as ``dp_flash_attn_func``; hostile queries; a ledger that was put back).
    Args:
        key_dim, value_dim: columns of a key and of a value row, public.
        key_heads: rows of a record. Queries have a multiple of them.
        epsilon, delta: of one call, both finite and > 0.
        logit_bound: logits become B * tanh(logit / B). Choose it without looking at the records.
        clip_norm: bound on each value row in the L2 norm.
        softmax_scale: None is 1 / sqrt(key_dim).
        ledger: one for these records: unit="token", this relation, with a budget.
        capacity: with relation "add_or_remove" only, and needed there.
        seed: None for noise nobody can predict; see ``dp_flash_attn_func``.
    Raises: PrivacyParameterError; LedgerError for a ledger with other terms or without a budget.
    Source: PRIVACY P3; the budget as a filter: P8.
    """

    def __init__(
        self,
        *,
        key_dim: int,
        value_dim: int,
        epsilon: float,
        delta: float,
        logit_bound: float,
        ledger: Ledger,
        key_heads: int = 1,
        clip_norm: float = 1.0,
        softmax_scale: float | None = None,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        for name, value in (("key_dim", key_dim), ("value_dim", value_dim), ("key_heads", key_heads)):
            integer(name, value, least=1)
        positive("epsilon", epsilon, remedy="Without noise it is ordinary attention and no private memory.")
        require(is_real(delta) and 0 < delta < 1, "delta must be in (0, 1)", delta)
        positive("logit_bound", logit_bound)
        positive("clip_norm", clip_norm)
        if softmax_scale is not None:
            positive("softmax_scale", softmax_scale)
        good = DTYPES.get(dtype, "float64") != "float64"
        require(good, "dtype must be torch.float32, bfloat16 or float16", dtype)
        _check_ledger(ledger)
        relation = ledger.relation
        if relation == "add_or_remove":
            hint = "It is the public number of places, taken or not."
            require(capacity is not None, 'relation="add_or_remove" needs capacity', capacity, hint)
            integer("capacity", capacity, least=1)
        else:
            hint = "The number of records is public there."
            require(capacity is None, 'capacity must be None with relation="replace"', capacity, hint)
        self.key_dim, self.value_dim, self.key_heads = key_dim, value_dim, key_heads
        self.epsilon, self.delta, self.logit_bound, self.clip_norm = epsilon, delta, logit_bound, clip_norm
        self.softmax_scale = 1.0 / math.sqrt(key_dim) if softmax_scale is None else float(softmax_scale)
        self.capacity, self.ledger, self.seed = capacity, ledger, seed
        self._width = max(key_dim, value_dim)
        # a record nobody has: [records, heads, width], both padded with zeros to one width
        self._keys = torch.zeros(0, key_heads, self._width, dtype=dtype, device=device)
        self._values = torch.zeros(0, key_heads, self._width, dtype=dtype, device=device)
        self._receipts: Receipts | None = None

    def __len__(self) -> int:
        """Records held. For the owner: with relation "add_or_remove" it is not to leave."""
        return len(self._keys)

    def __repr__(self) -> str:
        places = f"{len(self)} records" if self.capacity is None else f"capacity={self.capacity}"
        promise = f"epsilon={self.epsilon}, delta={self.delta} of a call, budget={self.ledger.budget}"
        return f"PrivateMemory({places}, {promise})"

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add records. It costs nothing; from now on every answer is about them, too.

        A row that is not finite is kept as it is and counts as zeros in every answer, in silence.

        Args: keys [records, key_heads, key_dim], values [records, key_heads, value_dim]; [records, dim] for one head.
        Raises: PrivacyParameterError for other shapes, or where `capacity` has no room. It is for the owner's eyes.
        """
        keys, values = self._rows("keys", keys, self.key_dim), self._rows("values", values, self.value_dim)
        require(len(values) == len(keys), f"values must hold {len(keys)} records, as keys do", len(values))
        if self.capacity is not None:
            room = self.capacity - len(self)
            require(len(keys) <= room, f"capacity={self.capacity} has room for {room} more records", len(keys))
        self._keys, self._values = torch.cat((self._keys, keys)), torch.cat((self._values, values))

    @torch.no_grad()
    def answer(self, queries: Tensor, *, return_privacy_stats: bool = False) -> Tensor | tuple[Tensor, PrivacyStats]:
        """Attention of the queries over all records: one release, charged before it is computed.

        No gradient: the slope of an answer in its query is a function of the records without noise.

        Args: queries [n, heads, key_dim], heads a multiple of key_heads; [n, key_dim] for one. Any values: a row that
            is not finite counts as zeros, and large ones meet the logit bound.
        Returns: [n, heads, value_dim], or [n, value_dim]; with return_privacy_stats the pair (out, PrivacyStats).
        Raises: BudgetExhausted; PrivacyParameterError for a shape, or without records; and as ``dp_flash_attn_func``.
        """
        flat = isinstance(queries, Tensor) and queries.dim() == 2
        asked = self._asked(queries)
        keys, values = self._attended()
        released = dp_flash_attn_func(
            asked[None],
            keys[None],
            values[None],
            softmax_scale=self.softmax_scale,
            epsilon=self.epsilon,
            delta=self.delta,
            unit="token",
            relation=self.ledger.relation or "replace",
            queries="public",
            clip_norm=self.clip_norm,
            logit_bound=self.logit_bound,
            ledger=self.ledger,
            seed=self.seed,
            return_privacy_stats=True,
        )
        assert isinstance(released, tuple)  # noqa: S101  (asked for above)
        out, stats = released
        if self._receipts is not None:
            self._receipts.add(stats.event_id)
        out = out[0, :, :, : self.value_dim]
        out = out[:, 0] if flat else out
        return (out, stats) if return_privacy_stats else out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the records to `path`, readable by their owner only, and from now on a receipt for each answer.

        The file holds the records as they are, without noise. The ledger stays a file of its own; `path`.receipts
        lists the lines that it must have.

        Raises: LedgerError for a ledger that lacks a line of the receipts; PrivacyParameterError for one in memory, or
            where safetensors is not installed.
        """
        require(self.ledger.path != ":memory:", "a saved memory needs a ledger that lasts", "one in memory", _LASTING)
        safetensors()  # before a receipt that no file would follow
        receipts = Receipts.of(path)
        receipts.check(self.ledger)
        receipts.begin(self.ledger)
        write_memory(Path(path), {"keys": self._keys, "values": self._values}, self._terms())
        self._receipts = receipts

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        ledger: Ledger,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> PrivateMemory:
        """The memory saved at `path`, with the ledger that it was saved with.

        A ledger that lacks a line of the receipts, because it is an older copy or another one, is refused: its budget
        would be spent twice. Ledger and receipts put back together look like the past and are not noticed, nor is a
        second copy of all files that is asked elsewhere; keep them out of backups that are restored, and move them
        rather than copy them.

        Raises: LedgerError; PrivacyParameterError for a file that is not a memory, or without safetensors.
        """
        tensors, terms = read_memory(Path(path))
        receipts = Receipts.of(path)
        _check_ledger(ledger)
        for name, kept in terms.pop("ledger").items():
            found = getattr(ledger, name)
            if found != kept:
                raise LedgerError(f"this memory needs its ledger with {name}={kept!r}, got one with {found!r}.")
        receipts.check(ledger, begun=True)
        memory = cls(**terms, dtype=tensors["keys"].dtype, device=device, seed=seed, ledger=ledger)
        shape = (*tensors["keys"].shape[:1], memory.key_heads, memory._width)
        for name in ("keys", "values"):
            require(
                tuple(tensors[name].shape) == shape, f"{name} in {path} must be {shape}", tuple(tensors[name].shape)
            )
        memory._keys, memory._values = (tensors[name].to(device) for name in ("keys", "values"))
        memory._receipts = receipts
        return memory

    def _terms(self) -> dict[str, Any]:
        names = ("key_dim", "value_dim", "key_heads", "epsilon", "delta", "logit_bound", "clip_norm")
        terms = {name: getattr(self, name) for name in (*names, "softmax_scale", "capacity")}
        return terms | {"ledger": {name: getattr(self.ledger, name) for name in ("relation", "delta", "budget")}}

    def _rows(self, name: str, rows: Tensor, dim: int) -> Tensor:
        if isinstance(rows, Tensor) and rows.dim() == 2 and self.key_heads == 1:
            rows = rows[:, None]
        good = isinstance(rows, Tensor) and rows.dim() == 3 and tuple(rows.shape[1:]) == (self.key_heads, dim)
        require(good and rows.is_floating_point(), f"{name} must be [records, {self.key_heads}, {dim}]", _shape(rows))
        return self._padded(rows)

    def _asked(self, queries: Tensor) -> Tensor:
        if isinstance(queries, Tensor) and queries.dim() == 2:
            queries = queries[:, None]
        good = isinstance(queries, Tensor) and queries.dim() == 3 and queries.shape[2] == self.key_dim
        require(
            good and queries.is_floating_point() and len(queries) > 0 and queries.shape[1] % self.key_heads == 0,
            f"queries must be [n, a multiple of {self.key_heads}, {self.key_dim}]",
            _shape(queries),
        )
        return self._padded(queries)

    def _padded(self, rows: Tensor) -> Tensor:
        rows = rows.detach().to(self._keys)
        return torch.nn.functional.pad(rows, (0, self._width - rows.shape[2]))

    def _attended(self) -> tuple[Tensor, Tensor]:
        if self.capacity is None:
            require(len(self) > 0, "a memory must hold a record before it answers", "none", "Append some.")
            return self._keys, self._values
        empty = self.capacity - len(self)
        keys, values = (torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, empty)) for rows in (self._keys, self._values))
        return keys, values


_LASTING = "Make it with Ledger.open(path, ...)."


def _check_ledger(ledger: Ledger) -> None:
    if not isinstance(ledger, Ledger) or ledger.budget is None or ledger.unit != "token" or ledger.relation is None:
        terms = "none" if not isinstance(ledger, Ledger) else f"unit={ledger.unit!r}, budget={ledger.budget!r}"
        raise LedgerError(
            f"a private memory needs a ledger of its own with unit='token', a relation, a delta and a budget, got "
            f"{terms}; open one with Ledger.open(path, unit='token', relation='replace', delta=..., budget=...)."
        )


def _shape(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
