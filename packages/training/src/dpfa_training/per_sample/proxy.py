"""A stand-in for a trainable parameter that sees every function it is given to.

Functions of parameters alone give stand-ins again. Where one meets a tensor of the batch, the function's
rule computes it so that backward notes each sample's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample.use import CONSTANT, FUNCTIONS, Use
from dpfa_training.per_sample.uses import Uses

SPREADING = {
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.Tensor.repeat,
    torch.Tensor.tile,
    torch.tile,
    torch.broadcast_to,
    torch.Tensor.broadcast_to,
    torch.repeat_interleave,
    torch.Tensor.repeat_interleave,
}
"""Functions whose result may count the samples though no operand does."""

_plainly = torch._C.DisableTorchFunctionSubclass


class Proxy(torch.Tensor):
    """A parameter, or what was computed from parameters alone.

    Attributes: `value` is the plain tensor, `label` says where it comes from, `parameters` are the names it
    depends on.
    """

    value: Tensor
    label: str
    parameters: tuple[str, ...]
    uses: Uses
    original: Tensor
    _is_param = True
    requires_grad = property(lambda self: True)

    @classmethod
    def over(cls, value: Tensor, label: str, parameters: tuple[str, ...], uses: Uses) -> Any:
        """A proxy over the data of `value`."""
        value = value.detach()
        proxy = torch.Tensor._make_subclass(cls, value)
        proxy.value, proxy.label, proxy.parameters, proxy.uses = value, label, parameters, uses
        return proxy

    def note(self, kind: str, *saved: Any) -> None:
        """Write down one use; `saved` as for ``Backend.sqnorm``, gradients with respect to `value`."""
        raise NotImplementedError

    def expect(self, *, product: bool) -> None:
        """A forward uses it, in a matrix product or as a table; known where the note will be of that kind, too."""

    def derive(self, func: Any, args: Any, kwargs: Any, proxies: list[Any], plain: list[Tensor]) -> Any:
        """`func` of `proxies`, this one the first, and of constants: a proxy again, or a plain answer."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKING:
            with _plainly():
                return func(*args, **kwargs)
        return _dispatch(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.original.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    proxies: list[Any] = []
    plain: list[Tensor] = []
    _sort(args, proxies, plain)
    _sort(kwargs.values(), proxies, plain)
    if not proxies:
        raise NotPrivateError(
            f"a parameter must be an argument of {getattr(func, '__name__', func)} itself or in a list, got it inside "
            "another object; pass it as it is."
        )
    uses = proxies[0].uses
    log, tape = uses.log, uses.tape
    if func is torch.autograd.backward:
        raise NotPrivateError(
            f"{proxies[0].label!r} must stay inside its checkpointed block, got it as the block's output, where "
            "its samples are added up; use checkpointing with use_reentrant=False."
        )
    if not torch.is_grad_enabled() and log is not None:
        log.passed_over = True
    if (log is None and tape is None) or not torch.is_grad_enabled() or func in _CUTTING:
        return func(*plain_of(args), **{name: plain_of(item) for name, item in kwargs.items()})
    if plain and func in _LIKE:
        if not isinstance(args[0], Proxy):  # a tensor of the batch takes over the dtype only
            return func(*plain_of(args), **{name: plain_of(item) for name, item in kwargs.items()})
        func, args, plain = torch.Tensor.to, (args[0], plain[0].dtype), []
    if args and isinstance(args[0], Proxy) and _in_place(func):
        raise Use(func, proxies, plain, (), 0).unknown("in place on a parameter")
    if func in SPREADING:
        return _spread(func, args, kwargs, proxies, plain)
    if not plain:
        return proxies[0].derive(func, args, kwargs, proxies, plain)
    key = (proxies[0].label, func, tuple([x.dim() for x in plain]))
    layouts = uses.layouts.get(key)
    if log is not None:
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, plain)):  # type: ignore[attr-defined]
            raise Use(func, proxies, plain, (), 0).unknown("inside a transform of torch.func")
        log.add(key, names_of(proxies), plain)
        if layouts is None:
            return func(*plain_of(args), **{name: plain_of(item) for name, item in kwargs.items()})
    if layouts is None or len(layouts) != len(plain):
        raise Use(func, proxies, plain, (), 0).unknown("the self-check did not see it used like this")
    rows = log.rows if log is not None else tape.rows
    constant = True
    for x, layout in zip(plain, layouts, strict=True):
        if layout is not None:
            constant = False
            fits = layout.fits(x.shape, rows)
            if fits and log is None and layout.joined != "no":
                fits = uses.explains(layout, x.shape[layout.dim] // rows)
            if not fits:
                raise Use(func, proxies, plain, (), 0).unknown(
                    f"an operand of shape {tuple(x.shape)} for {rows} samples, laid out in another way than before"
                )
        elif x.requires_grad:
            raise Use(func, proxies, plain, (), 0).unknown("an operand that depends on the batch as a whole")
    if constant:
        if _in_place(func):
            raise Use(func, proxies, plain, (), 0).unknown("in place on a constant")
        rule = CONSTANT.get(func)
        if rule is not None:
            return rule(Use(func, proxies, plain, layouts, rows), *args, **kwargs)
        return proxies[0].derive(func, args, kwargs, proxies, plain)
    use = Use(func, proxies, plain, layouts, rows)
    rule = FUNCTIONS.get(func)
    if rule is None:
        raise use.unknown()
    return rule(use, *args, **kwargs)


def names_of(proxies: Sequence[Any]) -> tuple[str, ...]:
    """The parameters that `proxies` depend on."""
    return tuple(dict.fromkeys(name for proxy in proxies for name in proxy.parameters))


def _sort(items: Any, proxies: list[Any], plain: list[Tensor]) -> None:
    for item in items:
        if isinstance(item, Proxy):
            proxies.append(item)
        elif isinstance(item, Tensor):
            plain.append(item)
        elif type(item) in (list, tuple):
            _sort(item, proxies, plain)


def plain_of(item: Any) -> Any:
    """An argument with plain tensors in the places of proxies."""
    if isinstance(item, Proxy):
        return item.value
    if type(item) in (list, tuple):
        return type(item)(plain_of(one) for one in item)
    return item


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__"):
        return True
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow")}


def _spread(func: Any, args: Any, kwargs: Any, proxies: list[Any], plain: list[Tensor]) -> Any:
    """A function whose result may have a row for each sample."""
    source = args[0]
    if not isinstance(source, Proxy):
        raise Use(func, proxies, plain, (), 0).unknown()
    uses = source.uses
    result = func(*plain_of(args), **{name: plain_of(item) for name, item in kwargs.items()})
    key = (source.label, func, (result.dim(),))
    layouts = uses.layouts.get(key)
    if uses.log is not None:
        uses.log.add(key, names_of(proxies), [result])
        if layouts is None:
            return result
    if layouts is None:
        raise Use(func, proxies, plain, (), 0).unknown("the self-check did not see it used like this")
    (layout,) = layouts
    if layout is None:
        return proxies[0].derive(func, args, kwargs, proxies, plain)
    rows = uses.log.rows if uses.log is not None else uses.tape.rows  # type: ignore[union-attr]
    use = Use(func, [source], [result], layouts, rows)
    if not layout.fits(result.shape, use.rows):
        raise use.unknown("another number of rows than samples")
    if plain and func is not Tensor.expand_as:
        raise use.unknown()
    copies = layout.spread(use.copies(source), result.shape, result.dim())
    if copies is None:
        raise use.unknown("more than one value for each sample")
    if copies.shape == result.shape:
        return copies
    if func in (Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to):
        return copies.expand(result.shape)
    times = [want // have for want, have in zip(result.shape, copies.shape, strict=True)]
    if func in (Tensor.repeat, Tensor.tile, torch.tile):
        return copies.repeat(*times)
    raise use.unknown()


_GETTERS = "shape dtype device ndim layout is_cuda is_sparse is_quantized is_leaf grad"
_ASKED = """
    size dim numel nelement element_size is_floating_point is_complex is_contiguous stride storage_offset __len__
    get_device data_ptr __hash__ __repr__ __format__ tolist item numpy __bool__ ndimension
"""
_ASKING: set[Any] = {getattr(torch.Tensor, name).__get__ for name in _GETTERS.split()}
_ASKING |= {getattr(torch.Tensor, name) for name in _ASKED.split()}
_CUTTING: set[Any] = {
    torch.Tensor.detach,
    torch.detach,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_tensor,
    torch.Tensor.new_full,
    torch.is_floating_point,
    torch.is_tensor,
    torch.result_type,
}
_LIKE: set[Any] = {torch.Tensor.type_as, torch.Tensor.to}
