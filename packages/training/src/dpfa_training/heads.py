"""Which rows and columns of an attention layer's projections belong to which head.

Any partition is as private as any other; it is only meant to follow the heads. A projection whose layout does not
fit the head count stays whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

from torch import nn

from dpfa_core.errors import PrivacyParameterError
from dpfa_training.clipping import Cut

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes in which a layer, or its config, keeps the number of heads."""

HEAD_SIZES = ("head_dim", "attention_head_size")

SEPARATE = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "q", "k", "v")
FUSED = ("c_attn", "qkv", "in_proj", "qkv_proj")
"""Query, key and value one after the other."""

OUTPUTS = ("out_proj", "o_proj", "out_lin", "c_proj", "o", "out", "proj")


def head_cuts(module: nn.Module, trainable: Collection[str]) -> tuple[dict[str, Cut], dict[str, str]]:
    """({parameter: its cut}, {piece: label of its head}) for the attention layers of `module`.

    Raises: PrivacyParameterError where no layer tells its head count.
    """
    cuts: dict[str, Cut] = {}
    labels: dict[str, str] = {}
    for path, layer in module.named_modules():
        heads = _known(layer, HEAD_COUNTS)
        for name, axis, size, copies in _projections(layer) if heads else ():
            whole = f"{path}.{name}" if path else name
            if whole not in trainable or whole in cuts:
                continue
            head_size = _known(layer, HEAD_SIZES) or size // (copies * heads)
            count = size // head_size if head_size else 0
            if not count or count * head_size != size or count > copies * heads or (copies == 3 and count != 3 * heads):
                continue
            cuts[whole] = Cut(axis, (head_size,) * count)
            for index, piece in enumerate(cuts[whole].names(whole)):
                # fewer heads of keys than of queries: each goes with the first query head that uses it
                head = index % heads if copies == 3 else index * heads // count
                labels[piece] = f"{path} head {head}"
    if not cuts:
        raise PrivacyParameterError(
            'clipping="per_head" needs attention layers that tell their head count (nn.MultiheadAttention, or '
            f"projections named like q_proj beside one of {', '.join(HEAD_COUNTS)}), got none in "
            f'{type(module).__name__}; use clipping="per_layer".'
        )
    return cuts, labels


def _projections(layer: nn.Module) -> Iterator[tuple[str, Literal[0, 1], int, int]]:
    """(parameter, axis along which the heads lie, its size, how many of query, key and value it holds)."""
    inputs = (*SEPARATE, *FUSED)
    own = dict(layer.named_parameters(recurse=False))
    stems = {name: name.removesuffix("_weight").removesuffix("_bias") for name in own}
    for name, parameter in own.items():
        if stems[name] != name and stems[name] in inputs:
            yield name, 0, parameter.shape[0], 3 if stems[name] in FUSED else 1
    children: dict[str, Any] = dict(layer.named_children())
    if not any(name in inputs for name in (*children, *stems.values())):
        return  # a feed-forward layer that knows the model's config
    for name, child in children.items():
        into = name in inputs
        transposed = type(child).__name__ == "Conv1D"  # of GPT-2: inputs first
        if not (into or name in OUTPUTS) or not (isinstance(child, nn.Linear) or transposed):
            continue
        axis: Literal[0, 1] = 0 if into != transposed else 1
        copies = 3 if name in FUSED else 1
        yield f"{name}.weight", axis, child.weight.shape[axis], copies
        if into and child.bias is not None:
            yield f"{name}.bias", 0, child.bias.shape[0], copies


def _known(layer: nn.Module, attributes: tuple[str, ...]) -> int:
    """The first of `attributes` that the layer or its config keeps as a number, else 0."""
    for owner in (layer, getattr(layer, "config", None)):
        for attribute in attributes:
            value: Any = getattr(owner, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
