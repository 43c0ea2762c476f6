"""Queries against a cache of keys and values that grows in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_attention.functional import released
from dpfa_attention.stats import PrivacyStats
from dpfa_core.checks import require
from dpfa_core.errors import NotPrivateError


@torch.no_grad()
def dp_flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **promise: Any,
) -> Tensor | tuple[Tensor, PrivacyStats]:
    """Append k and v to the cache at cache_seqlens, in place, and release attention of q over the cache.

    Each call is one release, charged by itself. A cached record meets every later call, so what it has lost
    is what all those calls cost together: keep one ledger for the life of the cache, and its ``spent`` is the
    sum over calls that PRIVACY P3 asks for. The cache itself is as private as what was put into it. There is
    no backward.

    Where a call is refused after its arguments were found good (an exhausted budget), k and v may lie in the
    cache already; nothing was released, and the same call may be made again.

    Guarantee: tested (as ``dp_flash_attn_func`` on the cache up to its length).
    Args:
        q: [B, S, H, D]; k_cache, v_cache: [B, capacity, Hk, D]; k, v: [B, S_new, Hk, D], both or none.
        cache_seqlens: public lengths before the call, one integer or an integer tensor [B]; None means that
            the cache is full, which leaves no room for k and v.
        causal, window_size: aligned bottom-right: the last query stands at the last cached key.
        rotary_interleaved, num_splits: accepted, without effect.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table: must be None.
        promise: the keyword arguments of ``dp_flash_attn_func``; `epsilon` and `delta` are required.
    Returns: out [B, S, H, D]; with return_privacy_stats=True the pair (out, PrivacyStats).
    Raises: NotPrivateError for return_softmax_lse; PrivacyParameterError for an option that is not offered or
        lengths that do not fit, before the cache is touched; and as ``dp_flash_attn_func``.
    Source: PRIVACY P3, P8.
    """
    if return_softmax_lse:
        raise NotPrivateError(
            "return_softmax_lse must be False, got True: the log-sum-exp is a function of the records that leaves "
            "without noise."
        )
    absent = {
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
    }
    for name, value in absent.items():
        require(value is None, f"{name} must be None", type(value).__name__, "Apply it to the tensors before the call.")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _four("a tensor [batch, length, heads, head_dim]", name, x)
    B, capacity = k_cache.shape[:2]
    require(
        v_cache.shape == k_cache.shape,
        f"v_cache must have the shape of k_cache, {list(k_cache.shape)}",
        list(v_cache.shape),
    )
    require(len(q) == B, f"q must have the batch of the cache, {B}", len(q))
    before = _lengths(cache_seqlens, B, capacity)
    after = before
    if k is not None or v is not None:
        _four("given with v, [batch, length, heads, head_dim],", "k", k)
        _four("given with k, [batch, length, heads, head_dim],", "v", v)
        assert k is not None and v is not None  # noqa: S101, PT018  (checked above)
        require(
            k.shape[0] == B and k.shape[2:] == k_cache.shape[2:] and v.shape == k.shape,
            f"k and v must be alike and fit the cache {list(k_cache.shape)}",
            (list(k.shape), list(v.shape)),
        )
        after = [length + k.shape[1] for length in before]
        require(max(after) <= capacity, f"cache_seqlens and k must leave a length <= {capacity}", max(after))
        rows = torch.arange(B, device=k_cache.device)[:, None]
        places = torch.tensor(before, device=k_cache.device)[:, None] + torch.arange(k.shape[1], device=k_cache.device)
        k_cache[rows, places], v_cache[rows, places] = k.to(k_cache.dtype), v.to(v_cache.dtype)
    used = max(1, *after)
    result: Tensor | tuple[Tensor, PrivacyStats] = released(
        q,
        k_cache[:, :used],
        v_cache[:, :used],
        lengths=tuple((q.shape[1], length) for length in after),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        **promise,
    )
    return result


def _four(expected: str, name: str, x: Any) -> None:
    good = isinstance(x, Tensor) and x.dim() == 4
    require(good, f"{name} must be {expected}", list(x.shape) if isinstance(x, Tensor) else type(x).__name__)


def _lengths(cache_seqlens: int | Tensor | None, batch: int, capacity: int) -> list[int]:
    if cache_seqlens is None:
        return [capacity] * batch
    if isinstance(cache_seqlens, Tensor):
        require(
            not cache_seqlens.is_floating_point() and cache_seqlens.shape == (batch,),
            f"cache_seqlens must be an integer tensor [{batch}]",
            f"{cache_seqlens.dtype} {list(cache_seqlens.shape)}",
        )
        lengths = [int(length) for length in cache_seqlens.tolist()]
    else:
        good = isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool)
        require(good, "cache_seqlens must be None, an integer or a tensor", cache_seqlens)
        lengths = [cache_seqlens] * batch
    require(min(lengths) >= 0 and max(lengths) <= capacity, f"cache_seqlens must lie in 0 ... {capacity}", lengths)
    return lengths
