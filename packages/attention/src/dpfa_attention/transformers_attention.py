"""transformers' ``attn_implementation="dp_attention"``: the attention function, and the mask function beside it.

transformers asks for an attention by name in two registries. Without an entry in the one for masks it hands out no mask
at all, and padding would be attended; so both are registered together.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dpfa_attention.padded_batches import Packing, ShownKeys, packing
from dpfa_attention.sdpa_layout import read_mask
from dpfa_attention.visible_lengths import seen
from dpfa_core.checks import require
from dpfa_core.errors import NotPrivateError, PrivacyParameterError

if TYPE_CHECKING:
    from dpfa_attention.transformers_models import ReleasedAttention

NAME = "dp_attention"
TERMS = "dp_release"
"""The attribute of an attention module that holds the terms of its releases."""

_WITHOUT_EFFECT = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "num_items_in_batch", "output_hidden_states"}
    | {"output_router_logits", "return_dict", "use_cache", "deterministic"}
)
"""What models hand to any attention function, and none computes with."""


def register_dp_attention() -> None:
    """Make "dp_attention" a name that transformers knows, for attention and for masks.

    ``release_attention`` does it by itself; a model that is built with ``attn_implementation="dp_attention"`` needs
    it before, and raises until it has its terms.

    Guarantee: tested.

    Raises: PrivacyParameterError without transformers.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise PrivacyParameterError(
            "private attention in transformers' models needs transformers >= 5, got none that can be imported "
            f"({error}); pip install 'dpfa-attention[transformers]'."
        ) from error
    AttentionInterface.register(NAME, dp_attention)
    AttentionMaskInterface.register(NAME, shown_keys)


def dp_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = False,
    **more: Any,
) -> tuple[Tensor, None]:
    """One release of the attention of `module`, as transformers calls it, on the terms of ``release_attention``.

    Guarantee: tested (as ``dp_flash_attn_func``; equal to transformers' own attention with epsilon inf).
    Args:
        query: [B, H, S, D]; key, value: [B, Hk, Sk, D]; a query head h uses key head h // (H / Hk).
        attention_mask: what the mask function made; a matrix as in ``dp_scaled_dot_product_attention``; or None,
            and then `is_causal` or the module's own says what is seen.
        softcap: a bound of the logits, see ``dp_flash_attn_func``.
    Returns: ([B, S, H, D], None): there are no weights to return.
    Raises: NotPrivateError for a module without terms, or weights asked for; PrivacyParameterError for dropout, and for
        an argument that a release has no meaning for, such as T5's position_bias; and as ``dp_flash_attn_func``.
    """
    releases: ReleasedAttention | None = getattr(module, TERMS, None)
    if releases is None:
        raise NotPrivateError(
            f"attn_implementation={NAME!r} needs the terms of its releases, got a {type(module).__name__} without any; "
            "call release_attention(model, epsilon=..., delta=...) before the model runs."
        )
    if output_attentions:
        refuse_weights()
    require(
        dropout == 0,
        f"the attention dropout of {type(module).__name__} must be 0 in a release",
        dropout,
        "Call model.eval(), or build the model without attention dropout; no sensitivity covers dropped weights.",
    )
    strange = sorted(name for name, given in more.items() if given is not None and name not in _WITHOUT_EFFECT)
    require(
        not strange,
        f"{NAME} must get what it can release",
        f"{', '.join(strange)} from {type(module).__name__}",
        "Choose a model whose attention does without, or another attn_implementation, which is not private.",
    )
    B, H, S, _ = query.shape
    Sk = key.shape[2]
    if attention_mask is None:
        attention_mask = _said_by(module, is_causal, sliding_window)
    terms: dict[str, Any] = {}
    if isinstance(attention_mask, ShownKeys):
        require(
            attention_mask.causal or Sk == S,
            f"{NAME} releases self-attention only",
            f"{S} queries beside {Sk} keys in {type(module).__name__}",
            "Choose a model without cross-attention.",
        )
        terms |= {"causal": attention_mask.causal, "window_size": attention_mask.window}
        rows = packing(attention_mask, shape=(B, S, Sk))
    else:
        good = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        require(good, f"attention_mask must be None, {[B, 1, S, Sk]} or made by {NAME}", type(attention_mask).__name__)
        shown, terms["bias"] = read_mask(attention_mask, B, H, S, Sk)
        terms["causal"], lengths, terms["mask"] = seen("attention_mask", shown)
        rows = Packing(lengths)
    q, k, v = rows.packed(*(x.transpose(1, 2) for x in (query, key, value)))
    out = releases.release(q, k, v, lengths=rows.lengths, softmax_scale=scaling, softcap=softcap or 0.0, **terms)
    setattr(module, RAN, True)
    return rows.unpacked(out), None


RAN = "dp_release_ran"
"""The attribute of an attention module that says that its forward came here."""


def refuse_weights() -> None:
    raise NotPrivateError(
        "output_attentions must be False, got True: attention weights are functions of the records that leave without "
        'noise; compute them apart, with attn_implementation="eager", outside what is promised.'
    )


def shown_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> ShownKeys:
    """What transformers asks of a mask function, answered by a flag, a window and the padding: nothing is S x S.

    Raises: PrivacyParameterError for a pattern that these cannot say (packed texts, chunks, patterns of the caller),
        and for a cache whose end is not the end of the queries (static caches).
    """
    causal, window = _pattern(mask_function, local_size)
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    require(
        at_end or not causal,
        "the last query must stand at the last key",
        f"{q_length} queries from {q_offset} on, {kv_length} keys from {kv_offset} on",
        "Use a cache that grows (DynamicCache), or none.",
    )
    if attention_mask is not None:
        # a cache with a window has dropped its first keys; a mask may be short of tokens that are all padding
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        missing = kv_length - attention_mask.shape[1]
        if missing:
            attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return ShownKeys(causal, attention_mask, window)


def _pattern(mask_function: Callable[..., Any] | None, local_size: int | None) -> tuple[bool, tuple[int, int]]:
    """(causal, window) of the patterns that are known; they are compared by what they are made of."""
    from transformers import masking_utils as known

    if mask_function is known.causal_mask_function:
        return True, (-1, -1)
    if mask_function is known.bidirectional_mask_function:
        return False, (-1, -1)
    if local_size is not None and _alike(mask_function, known.sliding_window_causal_mask_function(local_size)):
        return True, (local_size - 1, 0)
    raise PrivacyParameterError(
        f"{NAME} must be asked for a causal or bidirectional pattern, or a causal window, got "
        f"{getattr(mask_function, '__qualname__', mask_function)}; give an attention_mask instead of position_ids that "
        "start anew within a row, one text a row."
    )


def _alike(one: Any, other: Any) -> bool:
    """Are these the same functions of the same values?"""
    if not (isinstance(one, types.FunctionType) and isinstance(other, types.FunctionType)):
        if isinstance(one, tuple) and isinstance(other, tuple):
            return len(one) == len(other) and all(map(_alike, one, other))
        return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
    cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other)]
    return one.__code__ is other.__code__ and len(cells[0]) == len(cells[1]) and all(map(_alike, *cells))


def _said_by(module: nn.Module, is_causal: bool | None, sliding_window: int | None) -> ShownKeys:
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    require(
        isinstance(causal, bool) and (causal or sliding_window is None),
        f"{type(module).__name__} must say what its queries see",
        f"no mask, is_causal={causal}, sliding_window={sliding_window}",
        "Give the model an attention_mask.",
    )
    return ShownKeys(bool(causal), None, (-1, -1) if sliding_window is None else (sliding_window - 1, 0))
