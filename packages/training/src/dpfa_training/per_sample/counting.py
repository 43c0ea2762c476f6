"""Which tensors have as many rows as the data says: selected tokens, unpadded sequences.

Rows that were chosen by content may number the samples of one batch by chance, and belong to others in the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_CHOOSING = {_aten.nonzero, _aten.masked_select, _aten.unique_dim, _aten._unique2, _aten.unique_consecutive}
_SHAPED_BY_INDEX = {_aten.index, _aten.index_select, _aten.gather, _aten.embedding, _aten.take}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, remembers the tensors whose shape depends on numbers, and counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.aside = 0
        """Above 0 where operations do not count: in a module that runs once for each sample."""
        self._chosen: dict[int, Tensor] = {}

    def chosen(self, x: Tensor) -> bool:
        """Whether the shape of `x` came from numbers."""
        return _place(x) in self._chosen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.aside:
            return result
        self.operations += 1
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if self._chooses(func, inputs) or any(self.chosen(x) for x in inputs):
            shapes = {x.shape for x in inputs if not self.chosen(x)}
            if func.overloadpacket in _CHOOSING | _SHAPED_BY_INDEX:
                shapes = set()
            for item in pytree.tree_leaves(result):
                # what has the shape of another operand got it from there: tokens are put back into their batch
                if isinstance(item, Tensor) and item.shape not in shapes and item.numel():
                    self._chosen[_place(item)] = item  # kept alive, so that its memory is not another tensor's
        return result

    def _chooses(self, func: Any, inputs: Iterable[Tensor]) -> bool:
        if func.overloadpacket is _aten.index:
            return any(x.dtype in (torch.bool, torch.uint8) for x in list(inputs)[1:])
        return func.overloadpacket in _CHOOSING


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
