"""The same function in the layers that other libraries know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpfa_benchmarks.cases.one_by_one import Gradients

SUFFIX = "_table"


def with_tables(model: nn.Module) -> nn.Module:
    """`model` with its own bare parameters of shape (1, n, width) read from Embeddings, a row for each sample.

    Opacus has no rule for a bare parameter beside sub-modules and would run the whole model through
    ``torch.func.vmap``, fastDP none at all; an Embedding is what their users write. BERT's positions, which it
    looks up once for all samples, are passed as one row for each.
    """
    bare = {name: p for name, p in model.named_parameters(recurse=False) if p.dim() == 3 and len(p) == 1}
    tables = {}
    for name, parameter in bare.items():
        delattr(model, name)
        table = nn.Embedding(parameter.shape[1], parameter.shape[2])
        table.weight.data.copy_(parameter.detach()[0])
        tables[name + SUFFIX] = table
    # In the order of use: fastDP takes the first layer for the one whose backward comes last.
    layers = {**tables, **dict(model.named_children())}
    for name, layer in layers.items():
        if name in model._modules:
            delattr(model, name)
        model.add_module(name, layer)

    def look_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(args[0])
        for name in bare:
            table = module.get_submodule(name + SUFFIX)
            setattr(module, name, table(_indices(table.num_embeddings, rows)))  # type: ignore[arg-type]
        if hasattr(module, "bert"):
            kwargs = {**kwargs, "position_ids": _indices(args[0].shape[1], rows)}
            kwargs["token_type_ids"] = torch.zeros_like(args[0])
        return args, kwargs

    model.register_forward_pre_hook(look_up, with_kwargs=True)
    return model


def by_our_names(gradients: dict[str, Tensor]) -> Gradients:
    """Gradients of ``with_tables`` under the names and in the shapes of the model before it."""
    found: Gradients = {}
    for name, gradient in gradients.items():
        owner = name.removesuffix(".weight")
        if owner.endswith(SUFFIX):
            found[owner.removesuffix(SUFFIX)] = gradient.unsqueeze(0)
        else:
            found[name] = gradient
    return found


def _indices(count: int, rows: int) -> Tensor:
    return torch.arange(count).repeat(rows, 1)
