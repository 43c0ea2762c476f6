"""Functions that broadcast: each sample gets its copy of the parameter, shaped to meet its own numbers only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.use import Use, register

NAMES = """
    add sub mul div true_divide rsub pow maximum minimum fmax fmin where addcmul addcdiv lerp eq ne lt le gt ge
    multiply subtract divide masked_fill atan2 hypot logaddexp
"""
DUNDERS = "add radd sub rsub mul rmul truediv rtruediv div rdiv pow rpow iadd isub imul itruediv eq ne lt le gt ge"


def elementwise(use: Use, *args: Any, matrices: bool = False, **kwargs: Any) -> Any:
    """The function itself on copies of the parameters.

    Args: matrices: the last two dimensions are multiplied instead of broadcast.
    """
    batched = [(x, layout) for x, layout in zip(use.plain, use.layouts, strict=True) if layout is not None]
    rank = max(x.dim() for x in (*(proxy.value for proxy in use.proxies), *use.plain))
    found = {(layout.dim - x.dim(), layout.joined) for x, layout in batched}
    if len(found) != 1:
        raise use.unknown("operands with the samples in different dimensions")
    x, layout = batched[0]
    if matrices and layout.dim - x.dim() > -3:
        raise use.unknown()
    if layout.joined != "no" and any(y.shape[layout.dim] != x.shape[layout.dim] for y, _ in batched):
        raise use.unknown("operands with the samples in different dimensions")

    def copied(item: Any) -> Any:
        if isinstance(item, Proxy):
            copies = layout.spread(use.copies(item), x.shape, rank)
            if copies is None:
                raise use.unknown("more than one value for each sample")
            return copies
        if type(item) in (list, tuple):
            return type(item)(copied(one) for one in item)
        return item

    return use.function(*copied(args), **{name: copied(item) for name, item in kwargs.items()})


_FUNCTIONS = {
    getattr(owner, name)
    for stem in NAMES.split()
    for owner, name in ((torch, stem), (torch.Tensor, stem), (torch.Tensor, f"{stem}_"))
    if hasattr(owner, name)
}
_FUNCTIONS |= {getattr(torch.Tensor, f"__{name}__") for name in DUNDERS.split() if hasattr(torch.Tensor, f"__{name}__")}
register(*_FUNCTIONS)(elementwise)


@register(F.scaled_dot_product_attention)
def attention(use: Use, *args: Any, **kwargs: Any) -> Tensor:
    """Attention with a learned bias, or with learned queries, keys or values; torch's own kernel runs."""
    return elementwise(use, *args, matrices=True, **kwargs)  # type: ignore[no-any-return]
