"""From a loss down to the rows of the module's output: is it a sum of terms that depend on one row each?

Autograd's graph of the loss tells the functions, their shapes and what they saved. A function that keeps rows
apart, whichever it is, is believed and tested by a backward of its own (``loss_check``); what joins rows must
be a sum or a mean, and everything after it linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import Node

from dpfa_training.loss_owners import Coupled, Owners, Shape

Edge = tuple[Node, int]

FAR = 10_000
"""Functions between a loss and an output at most; a module's own loss may lead all through the module."""

_SHAPES = {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Clone", "ToCopy", "Alias", "Flatten"}
_LINEAR = {*_SHAPES, "Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Expand", "Stack", "Cat", "Select"}
_LINEAR |= {"Slice", "Unbind", "Permute", "Transpose", "T", "torch::autograd::CopyBackwards"}
_BROADCASTING = {"Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Where", "Maximum", "Minimum", "Expand", "Lerp", "Fmod"}
_BROADCASTING |= {"Addcmul", "Addcdiv", "Atan2", "Xlogy", "SMax", "Copysign", "MaskedFill"}


class Joined:
    """A sum of terms that depend on one row each."""


class Elsewhere:
    """Depends on a tensor of the module that does not tell its rows, or that is no output."""


JOINED, ELSEWHERE = Joined(), Elsewhere()
Value = Owners | Joined | Elsewhere | None


class Past(Exception):
    """The loss depends on something in the module that is no output with one row per sample."""


class TooFar(Exception):
    """The loss leads on without reaching an output."""


@dataclass
class Join:
    """Where terms of rows are added up: `factor` times the terms, times the gradient that arrives at `edge`."""

    edge: Edge
    factor: float
    terms: Edge
    owners: Owners
    shape: Shape


@dataclass
class LossGraph:
    """What lies between the loss and the outputs.

    Args:
        outputs: {edge: owners} of the module's output tensors.
        batch: how many rows they have.
        own: functions that end in a loss which the module computes itself.
        elsewhere: functions that end in an output which has another first dimension than the rows, or from which all
            comes that is computed with the module's parameters.
        inside: whether to look inside of `own`; without it, it is taken for a sum of its rows' terms.
    """

    outputs: dict[Edge, Owners]
    batch: int
    own: set[Node] = field(default_factory=set)
    elsewhere: set[Node] = field(default_factory=set)
    inside: bool = True
    joins: list[Join] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    factors: list[tuple[str, Any, Owners | None]] = field(default_factory=list)
    """What multiplies ("Mul") or divides ("Div") something of the batch, and the owners of that if rows are apart."""
    scalars: list[Edge] = field(default_factory=list)
    """The module's own losses, where nothing of the batch was found inside of them."""
    leaves: list[torch.Tensor] = field(default_factory=list)
    """Trainable tensors that the loss depends on, not by way of `outputs`."""
    found: set[Edge] = field(default_factory=set)
    """Those of `outputs` that the loss leads to, others not in between."""

    @property
    def reached(self) -> bool:
        """Whether the loss depends on the forward at hand."""
        return bool(self.found or self.scalars)

    def value(self, root: Edge) -> Value:
        """Of one tensor that backward begins with.

        Raises: Coupled, Past, TooFar.
        """
        order, values = self._order(root), {}
        for node in order:
            values[id(node)] = self._of(node, values)
        return self._edge(root, values)

    def _edge(self, edge: Edge, values: dict[int, list[Value]]) -> Value:
        node, number = edge
        if edge in self.outputs:
            self.found.add(edge)
            return self.outputs[edge]
        found = values.get(id(node)) or [None]
        return found[number] if number < len(found) else found[0]

    def _order(self, root: Edge) -> list[Node]:
        order: list[Node] = []
        if root in self.outputs:
            return order
        seen, stack = {root[0]}, [(root[0], False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
                continue
            stack.append((node, True))
            if node in self.own and not self.inside:
                continue
            for below, number in node.next_functions:
                if below is not None and below not in seen and (below, number) not in self.outputs:
                    seen.add(below)
                    stack.append((below, False))
            if len(seen) > FAR:
                raise TooFar
        return order

    def _of(self, node: Node, values: dict[int, list[Value]]) -> list[Value]:
        edges = [edge if edge[0] is not None else None for edge in node.next_functions]
        inputs = [None if edge is None else self._edge(edge, values) for edge in edges]
        if all(value is None or isinstance(value, Elsewhere) for value in inputs) or (
            node in self.own and not self.inside
        ):
            return [self._begin(node, inputs)]
        if any(isinstance(value, Elsewhere) for value in inputs):
            raise Past
        full = node.name()
        self.names.add(full)
        name = kind_of(full)
        shapes = [() if edge is None else shape_of(edge) for edge in edges]
        call = _Call(self, node, name, edges, inputs, shapes)
        return call.values()

    def _begin(self, node: Node, inputs: list[Value]) -> Value:
        """Of a function that nothing of the rows goes into."""
        leaf = getattr(node, "variable", None)
        if leaf is not None and node not in self.elsewhere:
            self.leaves.append(leaf)
        if node in self.own:
            self.scalars.append((node, 0))
            return JOINED
        return ELSEWHERE if node in self.elsewhere or any(value is not None for value in inputs) else None


@dataclass
class _Call:
    graph: LossGraph
    node: Node
    name: str
    edges: list[Edge | None]
    inputs: list[Value]
    shapes: list[Shape]

    def values(self) -> list[Value]:
        count = len(self.node._input_metadata)  # type: ignore[attr-defined]
        return [self.one(number) for number in range(count)]

    def one(self, number: int) -> Value:
        shape = shape_of((self.node, number))
        self.note_factors()
        if any(isinstance(value, Joined) for value in self.inputs):
            return self.linear()
        placed = [(i, value) for i, value in enumerate(self.inputs) if isinstance(value, Owners)]
        rule = _RULES.get(self.name)
        if rule is not None:
            return rule(self, shape, number)
        if getattr(self.node, "_saved_reduction", 0):
            return self.fused_loss(shape)
        return self.apart(placed, shape)

    # ---- several inputs

    def apart(self, placed: list[tuple[int, Owners]], shape: Shape) -> Value:
        """A function that keeps rows where they are; whether it does is tested later."""
        found = [self.kept(value, self.shapes[i], shape) for i, value in placed]
        if all(found[0].same(other) for other in found[1:]):
            return found[0]
        if self.name in ("Add", "Sub", "Rsub"):
            return self.linear()
        raise Coupled(f"{self.name} of the terms of different rows")

    def kept(self, owners: Owners, before: Shape, after: Shape) -> Owners:
        if owners.dim is None:
            return owners
        if self.name in _BROADCASTING:
            return owners.aligned(before, after)
        reduced = getattr(self.node, "_saved_dim", None)
        if reduced is not None and len(after) < len(before):
            return self.reduced(owners, before, after)
        if before == after:
            return owners
        if owners.dim == 0 and after and after[0] == before[0]:
            return owners
        raise Coupled(f"{self.name} with a result of shape {after} from rows in dimension {owners.dim} of {before}")

    def reduced(self, owners: Owners, before: Shape, after: Shape) -> Owners:
        dims = dims_of(self.node._saved_dim, len(before))  # type: ignore[attr-defined]
        if owners.dim in dims:
            raise Coupled(f"{self.name} over the rows")
        return owners.without(dims, len(after) == len(before))

    def linear(self) -> Value:
        """After rows were added up, or while single ones are."""
        if self.name not in _LINEAR:
            raise Coupled(f"{self.name} of a sum over rows")
        dependent = [value for value in self.inputs if value is not None]
        if self.name in ("Mul", "Div") and (len(dependent) > 1 or (self.name == "Div" and self.inputs[0] is None)):
            raise Coupled(f"{self.name} with a sum over rows on both sides")
        for edge, value, shape in zip(self.edges, self.inputs, self.shapes, strict=True):
            if isinstance(value, Owners) and edge is not None:
                self.graph.joins.append(Join(edge, 1.0, edge, value, shape))
        return JOINED

    def join(self, owners: Owners, factor: float) -> Value:
        edge = self.edges[0]
        assert edge is not None  # noqa: S101
        self.graph.joins.append(Join((self.node, 0), factor, edge, owners, self.shapes[0]))
        return JOINED

    def note_factors(self) -> None:
        if self.name not in ("Mul", "Div") or len([value for value in self.inputs if value is not None]) != 1:
            return
        first = self.inputs[0] is not None
        other = getattr(self.node, "_saved_other" if first else "_saved_self", None)
        if first or self.name == "Mul":
            value = self.inputs[0 if first else 1]
            self.graph.factors.append((self.name, other, value if isinstance(value, Owners) else None))

    # ---- one input

    def only(self) -> tuple[Owners, Shape]:
        owners = self.inputs[0]
        if not isinstance(owners, Owners):
            raise Coupled(f"{self.name} of the terms of different rows")
        return owners, self.shapes[0]

    def reshape(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        return owners.reshaped(before, shape)

    def permute(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        if owners.dim is None:
            return owners
        dims = dims_of(self.node._saved_dims, len(before))  # type: ignore[attr-defined]
        return Owners(dims.index(owners.dim), owners.rows)

    def transpose(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        node: Any = self.node
        first, second = dims_of((node._saved_dim0, node._saved_dim1), len(before))
        swapped = {first: second, second: first}
        return owners if owners.dim is None else Owners(swapped.get(owners.dim, owners.dim), owners.rows)

    def t(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        return owners if owners.dim is None or len(before) < 2 else Owners(1 - owners.dim, owners.rows)

    def _along(self, before: Shape) -> int:
        return dims_of(self.node._saved_dim, len(before))[0]  # type: ignore[attr-defined]

    def select(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        dim = self._along(before)
        if owners.dim != dim:
            return owners.without([dim], False)
        index = int(self.node._saved_index)  # type: ignore[attr-defined]
        return _single(owners, signed(index) % before[dim])

    def unbind(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        dim = self._along(before)
        return _single(owners, number) if owners.dim == dim else owners.without([dim], False)

    def slice(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        dim = self._along(before)
        if owners.dim != dim:
            return owners
        node: Any = self.node
        start, end, step = (int(getattr(node, f"_saved_{name}")) for name in ("start", "end", "step"))
        picked = owners.picked(slice(signed(start), min(signed(end), before[dim]), step))
        return picked if len(picked.rows) == shape[dim] else owners.picked(slice(-shape[dim], None))

    def split(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        dim = self._along(before)
        if owners.dim != dim:
            return owners
        start = number * int(self.node._saved_split_size)  # type: ignore[attr-defined]
        return owners.picked(slice(start, start + shape[dim]))

    def index_select(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        if owners.dim != self._along(before):
            return owners
        return owners.picked(self.node._saved_index.cpu().numpy())  # type: ignore[attr-defined]

    def index(self, shape: Shape, number: int) -> Value:
        owners, _ = self.only()
        indices = list(self.node._saved_indices)  # type: ignore[attr-defined]
        if owners.dim is None:
            return owners
        plain: list[torch.Tensor | None] = []
        for index in indices:  # a mask stands for one index for each of its dimensions
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            plain += list(index.nonzero(as_tuple=True)) if masks else [index]
        at = [dim for dim, index in enumerate(plain) if index is not None]
        first = at[0]
        if at != list(range(first, first + len(at))):
            raise Coupled("an index in dimensions that are not neighbours")
        shapes = torch.broadcast_shapes(*(index.shape for index in plain if index is not None))
        if owners.dim < first:
            return owners
        if owners.dim >= first + len(at):
            return Owners(owners.dim - len(at) + len(shapes), owners.rows)
        index = plain[owners.dim]
        rows = owners.rows[torch.broadcast_to(index, shapes).cpu().numpy()]  # type: ignore[arg-type]
        for axis in range(rows.ndim):
            own = np.moveaxis(rows, axis, 0).reshape(rows.shape[axis], -1)
            if own.size and (own == own[:, :1]).all():
                return Owners(first + axis, own[:, 0])
        if rows.size == 0:
            return Owners(first, rows.reshape(-1)[: shape[first]])
        raise Coupled("an index that takes the rows apart")

    def masked_select(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        if owners.dim is None:
            return owners
        mask = torch.broadcast_to(self.node._saved_mask, before)  # type: ignore[attr-defined]
        return Owners(0, owners.rows[mask.nonzero()[:, owners.dim].cpu().numpy()])

    def gather(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        if owners.dim is None:
            return owners
        if owners.dim == self._along(before):
            raise Coupled("Gather over the rows")
        return owners.picked(slice(0, shape[owners.dim]))

    def stack(self, shape: Shape, number: int) -> Value:
        placed = [value for value in self.inputs if isinstance(value, Owners)]
        dim = dims_of(self.node._saved_dim, len(shape))[0]  # type: ignore[attr-defined]
        if len(placed) == len(self.inputs) and all(value.dim is None for value in placed):
            return Owners(dim, np.concatenate([value.rows for value in placed]))
        first = placed[0]
        if first.dim is None or not all(first.same(other) for other in placed):
            return self.linear()
        return Owners(first.dim + (dim <= first.dim), first.rows)

    def cat(self, shape: Shape, number: int) -> Value:
        placed = [value for value in self.inputs if isinstance(value, Owners)]
        dim = dims_of(self.node._saved_dim, len(shape))[0]  # type: ignore[attr-defined]
        if len(placed) == len(self.inputs) and all(value.dim == dim for value in placed):
            return Owners(dim, np.concatenate([value.rows for value in placed]))
        if any(value.dim == dim or not placed[0].same(value) for value in placed):
            return self.linear()
        return placed[0]

    # ---- what joins

    def sum(self, shape: Shape, number: int) -> Value:
        return self._add_up(shape, mean=False)

    def mean(self, shape: Shape, number: int) -> Value:
        return self._add_up(shape, mean=True)

    def _add_up(self, shape: Shape, mean: bool) -> Value:
        owners, before = self.only()
        if owners.dim is None:
            return owners
        dims = dims_of(getattr(self.node, "_saved_dim", None) or (), len(before)) or list(range(len(before)))
        if owners.dim not in dims:
            return owners.without(dims, len(shape) == len(before))
        if not mean:
            return self.join(owners, 1.0)
        if not owners.even(self.graph.batch):
            raise Coupled("a mean over tokens, of which some rows have more than others")
        return self.join(owners, _count(shape) / max(_count(before), 1))

    def fused_loss(self, shape: Shape) -> Value:
        """mse_loss, binary_cross_entropy and the like, which reduce by themselves."""
        placed = [value for value in self.inputs if isinstance(value, Owners)]
        owners = placed[0]
        if not all(owners.same(other) for other in placed[1:]) or owners.dim is None:
            raise Coupled(f"{self.name} of the terms of different rows")
        if int(self.node._saved_reduction) != 1:  # type: ignore[attr-defined]
            return self.join(owners, 1.0)
        if not owners.even(self.graph.batch):
            raise Coupled(f"{self.name} as a mean over tokens, of which some rows have more than others")
        at = next(i for i, value in enumerate(self.inputs) if value is owners)
        # a loss of a row as a whole divides by their number, one of every number by the number of numbers
        whole = self.name.startswith("Multi") and len(self.shapes[at]) > 1
        return self.join(owners, 1.0 / max(len(owners.rows) if whole else _count(self.shapes[at]), 1))

    def nll_loss(self, shape: Shape, number: int) -> Value:
        owners, before = self.only()
        node: Any = self.node
        reduction = int(node._saved_reduction)
        if owners.dim is None:
            return owners
        if owners.dim == 1 and len(before) > 1:
            raise Coupled("classes in the place of the rows")
        if reduction == 0:
            return owners.without([1], False) if len(before) > 1 else owners
        if reduction != 1:
            return self.join(owners, 1.0)
        ignored = int((node._saved_target == signed(int(node._saved_ignore_index))).sum())
        if ignored:
            raise Coupled(f"cross_entropy as a mean over tokens, {ignored} of which are left out (ignore_index)")
        if node._saved_weight is not None:
            raise Coupled("cross_entropy with class weights, whose mean divides by the weights of all rows")
        if not owners.even(self.graph.batch):
            raise Coupled("cross_entropy as a mean over tokens, of which some rows have more than others")
        return self.join(owners, 1.0 / max(int(node._saved_target.numel()), 1))


_RULES: dict[str, Callable[[_Call, Shape, int], Value]] = {
    **dict.fromkeys(_SHAPES, _Call.reshape),
    "Permute": _Call.permute,
    "Transpose": _Call.transpose,
    "T": _Call.t,
    "Select": _Call.select,
    "Unbind": _Call.unbind,
    "Slice": _Call.slice,
    "Split": _Call.split,
    "IndexSelect": _Call.index_select,
    "Index": _Call.index,
    "MaskedSelect": _Call.masked_select,
    "Gather": _Call.gather,
    "Stack": _Call.stack,
    "Cat": _Call.cat,
    "Sum": _Call.sum,
    "Mean": _Call.mean,
    "NllLoss": _Call.nll_loss,
    "NllLoss2D": _Call.nll_loss,
}
"""What carries owners through a function of this name."""


def kind_of(name: str) -> str:
    """``MeanBackward1`` is a "Mean"; a function of the user's keeps its name, which has no number."""
    bare = name.rstrip("0123456789")
    return bare.removesuffix("Backward") if bare != name and bare.endswith("Backward") else name


def shape_of(edge: Edge) -> Shape:
    """Of the tensor that `edge` is the gradient of."""
    node, number = edge
    variable = getattr(node, "variable", None)
    if variable is not None:
        return tuple(variable.shape)
    return tuple(node._input_metadata[number].shape)  # type: ignore[attr-defined]


def dims_of(saved: Any, rank: int) -> list[int]:
    """Dimensions as autograd saved them, from the front."""
    return [signed(int(dim)) % max(rank, 1) for dim in (saved if isinstance(saved, Iterable) else (saved,))]


def signed(number: int) -> int:
    """A saved index, which autograd shows without its sign."""
    return number - 2**64 if number >= 2**63 else number


def _single(owners: Owners, index: int) -> Owners:
    return Owners(None, owners.rows[index : index + 1])


def _count(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
