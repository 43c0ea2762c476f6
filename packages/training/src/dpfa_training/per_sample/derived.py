"""What is computed from parameters alone is a stand-in again, and passes gradients on to where it came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfa_training.per_sample.materialise import materialise
from dpfa_training.per_sample.proxy import Proxy, names_of, plain_of

CASTS = {getattr(torch.Tensor, name) for name in ("to", "type", "float", "double", "bfloat16", "half")}
"""Methods that change the dtype and nothing else."""

_DROPPING = {torch.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}

FEW = 8
"""Up to so many samples, small gradients are computed one after the other: setting up a batch takes longer."""


class Source(Proxy):
    """A proxy from which others are derived."""

    def derive(self, func: Any, args: Any, kwargs: Any, proxies: list[Any], plain: list[Tensor]) -> Any:
        return _computed(func, args, kwargs, proxies, plain)


class Whole(Source):
    """A parameter itself."""

    def note(self, kind: str, *saved: Any) -> None:
        tape = self.uses.tape
        if tape is not None:
            tape.add(self.label, kind, *saved)

    def expect(self, *, product: bool) -> None:
        if self.uses.tape is not None:
            self.uses.tape.expect(self.label, self.value.numel() if product else 0)


class View(Source):
    """The numbers of another proxy in another shape or dtype."""

    source: Any

    def note(self, kind: str, *saved: Any) -> None:
        rows = saved[0].shape[0]
        gradient = materialise(kind, saved, self.value.shape)
        self.source.note("bare", gradient.reshape(rows, *self.source.value.shape))


class _Cast(View):
    """Another proxy in another dtype."""

    def expect(self, *, product: bool) -> None:
        self.source.expect(product=product)

    def note(self, kind: str, *saved: Any) -> None:
        self.source.note(kind, *saved)


class _Transposed(View):
    """A matrix with its dimensions exchanged."""

    def expect(self, *, product: bool) -> None:
        self.source.expect(product=product)

    def note(self, kind: str, *saved: Any) -> None:
        if kind == "linear":
            a, g = saved
            self.source.note("linear", g, a)
        else:
            self.source.note("bare", materialise(kind, saved, self.value.shape).mT)


class _Part(View):
    """Some rows of another proxy, from `start`."""

    start: int

    def expect(self, *, product: bool) -> None:
        self.source.expect(product=product)

    def note(self, kind: str, *saved: Any) -> None:
        after = self.source.value.shape[0] - self.start - self.value.shape[0]
        if kind == "linear":
            a, g = saved
            self.source.note("linear", a, torch.nn.functional.pad(g, (self.start, after)))
            return
        gradient = materialise(kind, saved, self.value.shape)
        whole = gradient.new_zeros(gradient.shape[0], *self.source.value.shape)
        whole[:, self.start : self.start + self.value.shape[0]] = gradient
        self.source.note("bare", whole)


class _Computed(Source):
    """Any other function of proxies; its own small graph leads back to them."""

    graph: Tensor
    leaves: tuple[tuple[Any, Tensor], ...]

    def note(self, kind: str, *saved: Any) -> None:
        cotangents = materialise(kind, saved, self.value.shape).to(self.graph.dtype)
        leaves = [leaf for _, leaf in self.leaves]
        for (source, _), gradient in zip(self.leaves, self._pulled_back(leaves, cotangents), strict=True):
            source.note("bare", gradient)

    def _pulled_back(self, leaves: list[Tensor], cotangents: Tensor) -> list[Tensor]:
        def pull(cotangent: Tensor, batched: bool) -> list[Tensor | None]:
            return list(
                torch.autograd.grad(
                    self.graph, leaves, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
                )
            )

        rows = len(cotangents)
        if rows > FEW:
            try:
                found = pull(cotangents, True)
            except RuntimeError:  # a function that cannot be batched
                pass
            else:
                return [x.new_zeros(rows, *x.shape) if g is None else g for x, g in zip(leaves, found, strict=True)]
        each = [pull(one, False) for one in cotangents]
        return [
            torch.stack([torch.zeros_like(leaf) if gradient is None else gradient for gradient in gradients])
            for leaf, gradients in zip(leaves, zip(*each, strict=True), strict=True)
        ]


def transposed(weight: Any) -> Any:
    """The transpose of a matrix, proxy or not."""
    if not isinstance(weight, Proxy):
        return weight.mT
    return _view(weight, weight.value.t(), f"{weight.label}.t")


def _computed(func: Any, args: Any, kwargs: Any, proxies: list[Any], plain: list[Tensor]) -> Any:
    """A function of parameters and constants alone: a proxy again, or a plain answer."""
    first = proxies[0]
    # what is done in train() mode only must not hide how the result is used from the survey, which runs in eval()
    label = first.label if func in _DROPPING else f"{first.label}.{getattr(func, '__name__', 'function')}"
    if len(proxies) == 1 and not plain:
        with torch.no_grad():
            result = func(*plain_of(args), **{key: plain_of(item) for key, item in kwargs.items()})
        if not _holds_tensor(result):
            return result
        if isinstance(result, Tensor):
            view = _view(first, result, label, cast=func in CASTS)
            if view is not None:
                return view
        elif type(result) in (list, tuple):
            views = [_view(first, one, f"{label}.{i}") for i, one in enumerate(result)]
            if all(view is not None for view in views):
                return type(result)(views)
    leaves: dict[int, tuple[Any, Tensor]] = {}

    def leaf(item: Any) -> Any:
        if isinstance(item, Proxy):
            if id(item) not in leaves:
                wanted = item.value.is_floating_point()
                leaves[id(item)] = (item, item.value.detach().requires_grad_(wanted))
            return leaves[id(item)][1]
        if type(item) in (list, tuple):
            return type(item)(leaf(one) for one in item)
        return item

    with torch.enable_grad():
        result = func(*leaf(args), **{key: leaf(item) for key, item in kwargs.items()})
    sources = tuple(leaves.values())

    def wrap(item: Any, label: str) -> Any:
        if isinstance(item, Tensor) and item.requires_grad:
            proxy = _Computed.over(item, label, names_of(proxies), first.uses)
            proxy.graph, proxy.leaves, proxy.original = item, sources, proxy.value
            return proxy
        if isinstance(item, (list, tuple)):
            wrapped = [wrap(one, f"{label}.{i}") for i, one in enumerate(item)]
            return type(item)(wrapped) if type(item) in (list, tuple) else type(item)(*wrapped)
        return item

    return wrap(result, label)


def _holds_tensor(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return any(_holds_tensor(item) for item in result)
    return isinstance(result, Tensor)


def _view(source: Any, result: Tensor, label: str, *, cast: bool = False) -> Any:
    """A proxy for `result` if its numbers are those of `source`, laid out in a known way."""
    base, start = source.value, 0
    kind: type[View] | None = None
    if result.dtype != base.dtype:
        kind = _Cast if cast and result.is_floating_point() else None
    elif result.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    elif result.shape == base.shape and result.stride() == base.stride():
        if result.storage_offset() == base.storage_offset():
            if cast or label == source.label:
                return source
            kind = View  # a slice that happens to be the whole is used like any other slice
    elif base.dim() == 2 and result.shape == base.shape[::-1] and result.stride() == base.stride()[::-1]:
        kind = _Transposed if result.storage_offset() == base.storage_offset() else None
    elif result.is_contiguous() and base.is_contiguous():
        offset = result.storage_offset() - base.storage_offset()
        if result.numel() == base.numel() and offset == 0:
            kind = View
        elif result.dim() == base.dim() and result.shape[1:] == base.shape[1:] and offset % base.stride(0) == 0:
            kind, start = _Part, offset // base.stride(0)
    if kind is None:
        return None
    proxy = kind.over(result, label, source.parameters, source.uses)
    proxy.source, proxy.start, proxy.original = source, start, result
    return proxy
