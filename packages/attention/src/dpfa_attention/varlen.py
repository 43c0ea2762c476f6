"""Sequences of different lengths, packed one after the other as flash-attn packs them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dpfa_attention.functional import released
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import integer, require


def dp_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **promise: Any,
) -> Tensor | tuple[Tensor, PrivacyStats]:
    """One release of attention over packed sequences; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    The whole call is one line of the ledger: a record lies in one sequence, and the noise fits the worst of
    them. The lengths are public, and equal for neighbours. A packed sequence is what a batch row is in
    ``dp_flash_attn_func``: one record of unit="sequence". The tensors are padded inside, so memory grows with
    sequences times the longest one; what is returned has no padding.

    Guarantee: tested (as ``dp_flash_attn_func``, sequence by sequence).
    Args:
        q: [total_q, H, D]; k, v: [total_k, Hk, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [sequences + 1], from 0 up to the total. A length may be 0.
        max_seqlen_q, max_seqlen_k: at least the longest length.
        promise: the keyword arguments of ``dp_flash_attn_func``; `epsilon` and `delta` are required.
        The others are as in ``dp_flash_attn_func``.
    Returns: out [total_q, H, D]; with return_privacy_stats=True the pair (out, PrivacyStats).
    Raises: PrivacyParameterError for lengths that do not fit, before anything is released; and as
        ``dp_flash_attn_func``.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        require(
            isinstance(x, Tensor) and x.dim() == 3, f"{name} must be a packed tensor [total, heads, head_dim]", shape
        )
    q_lengths = _lengths("q", cu_seqlens_q, q, max_seqlen_q)
    k_lengths = _lengths("k", cu_seqlens_k, k, max_seqlen_k)
    require(
        len(q_lengths) == len(k_lengths),
        f"cu_seqlens_k must describe {len(q_lengths)} sequences, as cu_seqlens_q does",
        len(k_lengths),
    )
    require(v.shape == k.shape, f"v must have the shape of k, {list(k.shape)}", list(v.shape))
    row = _places(q_lengths, q.device)
    key = _places(k_lengths, k.device)
    result = released(
        _padded(q, q_lengths, row),
        _padded(k, k_lengths, key),
        _padded(v, k_lengths, key),
        lengths=tuple(zip(q_lengths, k_lengths, strict=True)),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
        **promise,
    )
    if isinstance(result, Tensor):
        return result[row]
    out, stats = result
    return out[row], stats


def _lengths(name: str, cu_seqlens: Tensor, packed: Tensor, longest: int) -> list[int]:
    """The length of each sequence; the ends are public."""
    require(
        isinstance(cu_seqlens, Tensor)
        and cu_seqlens.dtype in (torch.int32, torch.int64)
        and cu_seqlens.dim() == 1
        and len(cu_seqlens) > 1,
        f"cu_seqlens_{name} must be an int32 or int64 tensor [sequences + 1]",
        f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__,
    )
    ends = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    require(
        ends[0] == 0 and ends[-1] == len(packed) and min(lengths) >= 0,
        f"cu_seqlens_{name} must rise from 0 to the {len(packed)} rows of {name}",
        ends if len(ends) <= 16 else f"{ends[:8]} ... {ends[-8:]}",
    )
    integer(f"max_seqlen_{name}", longest, least=max(lengths))
    return lengths


def _places(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each packed row."""
    sizes = torch.tensor(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return sequence.to(device), (torch.arange(len(sequence)) - first).to(device)


def _padded(packed: Tensor, lengths: list[int], places: tuple[Tensor, Tensor]) -> Tensor:
    """[sequences, longest, heads, head_dim]; zeros past each length."""
    # the longest real length, not max_seqlen: a generous caller pays nothing for it
    padded = packed.new_zeros(len(lengths), max(1, *lengths), *packed.shape[1:])
    return padded.index_put(places, packed)
