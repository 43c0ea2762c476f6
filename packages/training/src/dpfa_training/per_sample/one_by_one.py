"""The exact fallback: a module runs once for each sample, with that sample's copies of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpfa_training.per_sample.proxy import Proxy
from dpfa_training.per_sample.samples import Samples
from dpfa_training.per_sample.use import Use
from dpfa_training.per_sample.uses import UnknownUse, Uses

Slot = tuple[nn.Module, str, str]
"""(owner, attribute, parameter name): one place where a parameter hangs."""


def one_by_one(path: str, original: Callable[..., Any], slots: Sequence[Slot], proxies: dict[str, Any]) -> Any:
    """The forward to use for the module at `path`, whose parameters hang in `slots`."""
    names = tuple(dict.fromkeys(name for _, _, name in slots))
    uses: Uses = proxies[names[0]].uses
    label = path or "the module"

    def run(*args: Any, **kwargs: Any) -> Any:
        log, tape = uses.log, uses.tape
        if not torch.is_grad_enabled() and log is not None:
            log.passed_over = True
        if not torch.is_grad_enabled() or (log is None and tape is None):
            with _hung(slots, {name: proxies[name].value for name in names}):
                return original(*args, **kwargs)
        leaves, form = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (label, one_by_one, tuple([x.dim() for x in tensors]))
        layouts = uses.layouts.get(key)
        if log is not None:
            log.add(key, names, tensors)
            if layouts is None:
                log.counting.aside += 1
                with _hung(slots, {name: proxies[name].value for name in names}):
                    output = original(*args, **kwargs)
                log.counting.aside -= 1
                return output
        if layouts is None or len(layouts) != len(tensors):
            raise UnknownUse(names, label, one_by_one, "the self-check did not see it called like this")
        if any(isinstance(x, Proxy) for x in tensors) or not set(layouts) <= {None, Samples(0)} or not any(layouts):
            raise UnknownUse(names, label, one_by_one, "its inputs have no row for each sample")
        rows = log.rows if log is not None else tape.rows  # type: ignore[union-attr]
        wrong = [x.shape for x, layout in zip(tensors, layouts, strict=True) if layout and len(x) != rows]
        if wrong:
            raise UnknownUse(names, label, one_by_one, f"{rows} rows expected, got {tuple(wrong[0])}")
        batched = iter([layout is not None for layout in layouts])
        cut = [isinstance(leaf, Tensor) and next(batched) for leaf in leaves]
        use = Use(one_by_one, [proxies[name] for name in names], [], (), rows)
        copies = {name: use.copies(proxies[name]).unbind(0) for name in names}
        outputs = []
        if log is not None:
            log.counting.aside += 1
        for index in range(rows):
            own = [leaf[index : index + 1] if here else leaf for leaf, here in zip(leaves, cut, strict=True)]
            one_args, one_kwargs = pytree.tree_unflatten(own, form)
            with _hung(slots, {name: copies[name][index] for name in names}):
                outputs.append(original(*one_args, **one_kwargs))
        if log is not None:
            log.counting.aside -= 1
        return _joined(outputs, names, label)

    return run


def _joined(outputs: list[Any], names: tuple[str, ...], label: str) -> Any:
    flat = [pytree.tree_flatten(output) for output in outputs]
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(leaves[0], Tensor):
            joined.append(leaves[0])
        elif any(leaf.dim() == 0 or leaf.shape[0] != 1 for leaf in leaves):
            raise UnknownUse(names, label, one_by_one, "its outputs have no row for each sample")
        else:
            joined.append(torch.cat(leaves))
    return pytree.tree_unflatten(joined, flat[0][1])


@contextmanager
def _hung(slots: Sequence[Slot], values: dict[str, Tensor]) -> Iterator[None]:
    before = [owner._parameters[attribute] for owner, attribute, _ in slots]
    for owner, attribute, name in slots:
        owner._parameters[attribute] = values[name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for (owner, attribute, _), value in zip(slots, before, strict=True):
            owner._parameters[attribute] = value
