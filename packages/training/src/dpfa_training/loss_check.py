"""At every backward: the loss that the user's loop computed must be a sum of terms that depend on one row each.

The check stands in front of ``torch.autograd.backward``, where ``Tensor.backward`` leads as well; a backward that
comes another way finds its engine closed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training import tape
from dpfa_training.guard import engine_of_parameter
from dpfa_training.loss_graph import Edge, Elsewhere, Join, LossGraph, Past, TooFar, kind_of
from dpfa_training.loss_owners import Coupled, Owners
from dpfa_training.plan import Reduction

PROBED = 3
"""Losses that are probed by backward passes of their own; later ones where they use functions not seen before."""
FIX = (
    'compute one loss for each row (reduction="none", then a mean over the row\'s own tokens) and take the mean over '
    "rows"
)


class LossCheck:
    """Looks at the loss of every step of one engine, before a gradient exists.

    Guarantee: tested. Rows are kept apart until they are added up or averaged with a factor that is the same at
    every step. Assumed of tensors without gradient (labels, masks, weights): each row's are its own.
    """

    def __init__(self, reduction: Reduction, anchor: torch.Tensor) -> None:
        self.reduction = reduction
        # all that a recorded forward computes with parameters leads to the anchor
        self._past_outputs = get_gradient_edge(anchor).node
        self._outputs: dict[Edge, Owners] = {}
        self._own: set[Any] = set()
        self._elsewhere: set[Any] = set()
        self._rows = 0
        self._asleep: Callable[[bool], None] = lambda asleep: None
        self._factors: list[tuple[float, float]] = []
        self._probed = 0
        self._seen: set[str] = set()
        self.passed = True
        """Whether the loss of the forward at hand has been looked at, or none has to be."""

    def expect(self, output: Any, rows: int, asleep: Callable[[bool], None]) -> None:
        """A forward ended with `output`; `asleep(True)` until ``asleep(False)`` makes its backward do nothing."""
        self.forget()
        self._rows, self._asleep = rows, asleep
        self._elsewhere.add(self._past_outputs)
        leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
        for leaf in leaves:
            edge = get_gradient_edge(leaf)
            if leaf.dim() and leaf.shape[0] == rows:
                self._outputs[(edge.node, edge.output_nr)] = Owners(0, np.arange(rows))
            else:
                (self._elsewhere if leaf.dim() else self._own).add(edge.node)
        self.passed = False
        if leaves:
            _waiting[id(self)] = self

    def forget(self) -> None:
        """The forward at hand will not have a backward."""
        self._outputs, self._own, self._elsewhere = {}, set(), set()
        _waiting.pop(id(self), None)

    def before_backward(self, roots: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        """Called with what backward was called with.

        Raises: NotPrivateError.
        """
        edges = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, roots)]
        try:
            graph = self._graph(edges, roots)
            if not graph.reached:
                return
            self._refuse_leaves(graph)
            self._asleep(True)
            try:
                self._refuse_factors(graph)
                self._compare_factors(graph, roots, gradients)
                if self._probed < PROBED or graph.names - self._seen:
                    self._probe(graph, roots, gradients)
                    self._probed += 1
                    self._seen |= graph.names
            finally:
                self._asleep(False)
        except TooFar:
            raise NotPrivateError(
                "the loss must lead to the module's output within 10000 functions, got more; compute it for all rows "
                "at once."
            ) from None
        except Coupled as coupled:
            raise NotPrivateError(
                f"the loss must add up terms that depend on one row each, got {coupled}; {FIX}."
            ) from None
        self._done()

    def _graph(self, edges: list[Edge], roots: list[torch.Tensor]) -> LossGraph:
        # a module's own loss may lead all through the module; what it does with the rows is then the self-check's
        for inside in (True, False) if self._own and self._outputs else (not self._own,):
            graph = LossGraph(self._outputs, self._rows, self._own, self._elsewhere, inside)
            try:
                for edge, root in zip(edges, roots, strict=True):
                    value = graph.value(edge)
                    if isinstance(value, Owners):
                        graph.joins.append(Join(edge, 1.0, edge, value, tuple(root.shape)))
                    elif isinstance(value, Elsewhere):
                        raise Past
            except (Past, TooFar) as problem:
                if inside and self._own:
                    continue
                if isinstance(problem, TooFar):
                    raise
                raise Coupled(
                    "an output of the module that does not have one row per sample, or a tensor that it does not return"
                ) from None
            return graph
        raise TooFar

    def _done(self) -> None:
        self.passed = True
        self.forget()

    def _refuse_leaves(self, graph: LossGraph) -> None:
        for leaf in graph.leaves:
            # inside of a module's own loss there may be leaves that lead to its input
            outside = isinstance(leaf, torch.nn.Parameter) or not self._own
            if outside and engine_of_parameter(leaf) is None:
                raise NotPrivateError(
                    f"the loss must have no trainable tensors of its own, got one of shape {tuple(leaf.shape)}, which "
                    "would be trained without clip and noise; make it part of the module before make_private, or "
                    "detach it."
                )

    # ---- factors

    def _refuse_factors(self, graph: LossGraph) -> None:
        for name, other, owners in graph.factors:
            if not isinstance(other, torch.Tensor) or other.numel() != 1 or other.dtype in _PLAIN:
                continue
            value = float(other)
            if name == "Mul" and owners is None and value >= 2 and np.log2(value) % 1 == 0:
                raise NotPrivateError(
                    f"the loss must be what its rows lose, got {value:g} times that, as a GradScaler makes it: norms "
                    "would be clipped at another size than stated. Use bfloat16 autocast, and no GradScaler."
                )
            if self._rows == 1:  # there is no other row here
                continue
            raise Coupled(
                f"a tensor of one number ({value:.6g}) by which the terms are {_DONE[name]}, computed from who knows "
                "which rows (write a constant as a Python number)"
            )

    def _compare_factors(
        self, graph: LossGraph, roots: list[torch.Tensor], gradients: list[torch.Tensor | None]
    ) -> None:
        """What a row's terms are multiplied with is public only if it is always the same."""
        scale = self._rows if self.reduction == "mean" else 1
        joins = [(GradientEdge(*join.edge), join.factor * scale) for join in graph.joins]
        joins += [(GradientEdge(*edge), 1.0) for edge in graph.scalars]  # the mean over rows is taken inside
        found = torch.autograd.grad(
            roots, [edge for edge, _ in joins], _given(roots, gradients), retain_graph=True, allow_unused=True
        )
        seen: list[tuple[float, float]] = []
        for (_, factor), gradient in zip(joins, found, strict=True):
            if gradient is None or not gradient.numel():
                continue
            precision = 8 * torch.finfo(gradient.dtype).eps
            seen += [(float(x) * factor, precision) for x in torch.aminmax(gradient)]
        if not self._factors:
            self._factors = seen
        for value, precision in seen:
            if not any(_near(value, *known, precision) for known in self._factors):
                before = ", ".join(sorted({f"{known:.6g}" for known, _ in self._factors}))
                raise Coupled(
                    f"terms that count {value:.6g} times where they counted {before} times at the first step under "
                    f'reduction="{self.reduction}" (a mean over tokens, over a padded length that changes, or a '
                    "schedule of the loss's weights, which belongs before the mean)"
                )

    # ---- probes

    def _probe(self, graph: LossGraph, roots: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        # others may lie behind these, and a gradient for them would go through the module
        outputs = [GradientEdge(*edge) for edge in graph.found]
        if not outputs:
            return
        generator = torch.Generator().manual_seed(self._probed)
        try:
            own = torch.autograd.grad(roots, outputs, _given(roots, gradients), retain_graph=True, allow_unused=True)
            _refuse_token_means(graph, [gradient for gradient in own if gradient is not None], self._rows)
            for half in torch.rand(2, self._rows, generator=generator) < 0.5:
                for join in graph.joins:
                    if join.terms in self._outputs:
                        continue
                    moved = torch.autograd.grad(
                        [GradientEdge(*join.terms)],
                        outputs,
                        [_on(join, half, generator)],
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for gradient in moved:
                        if gradient is None:
                            continue
                        others = gradient.detach().cpu()[~half]
                        # a row that is not finite turns 0 into NaN, in its own gradient
                        if bool(((others != 0) & others.isfinite()).any()):
                            names = ", ".join(sorted(map(kind_of, graph.names)))
                            raise Coupled(f"rows that move the terms of other rows ({names})")
        except RuntimeError as error:
            raise NotPrivateError(
                f"the loss must allow a second look at its graph, got {str(error).splitlines()[0]!r}; compute the "
                "loss outside of compiled functions."
            ) from error


_PLAIN = (torch.float64, torch.int64)
"""How autograd keeps Python numbers."""
_DONE = {"Mul": "multiplied", "Div": "divided"}


def _near(value: float, known: float, *precisions: float) -> bool:
    return abs(value - known) <= max(*precisions, 1e-6) * abs(known)


def _given(roots: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [torch.ones_like(root) if own is None else own for root, own in zip(roots, gradients, strict=True)]


def _on(join: Join, half: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A gradient for the terms of half of the rows."""
    metadata = join.terms[0]._input_metadata[join.terms[1]]  # type: ignore[attr-defined]
    probe = torch.randn(join.shape, generator=generator)
    keep = half[torch.from_numpy(np.array(join.owners.rows))].to(probe)
    if join.owners.dim is not None:
        keep = keep.view(*(len(keep) if dim == join.owners.dim else 1 for dim in range(probe.dim())))
    else:
        keep = keep.reshape(())
    return (probe * keep).to(metadata.device, metadata.dtype)


def _refuse_token_means(graph: LossGraph, gradients: Iterable[torch.Tensor], rows: int) -> None:
    """A divisor that equals the number of tokens that count, where rows have unequally many."""
    counts = []
    for gradient in gradients:
        counting = (gradient != 0).reshape(rows, -1, gradient.shape[-1] if gradient.dim() > 1 else 1)
        counts += [counting.any(2).sum(1), counting.sum((1, 2))]
    tokens = {int(count.sum()) for count in counts if bool((count != count[0]).any())} - {rows}
    for name, other, owners in graph.factors:
        if not isinstance(other, torch.Tensor) or other.numel() == 1:
            number = float(other)
            number = number if name == "Div" else 1 / number if number else 0.0
            if any(abs(number - count) <= 1e-6 * count for count in tokens):
                raise Coupled(f"a mean over the {number:.0f} tokens of all rows, of which rows have unequally many")
        elif owners is not None and owners.dim is not None and not other.requires_grad:
            weights = other.double() if name == "Mul" else 1 / other.double()
            total = float(weights.sum())
            if abs(total - 1) <= 1e-5 and bool((weights != weights.round()).any()) and weights.dim():
                own = weights.movedim(owners.dim, 0) if weights.dim() > owners.dim else weights
                sums = own.reshape(len(own), -1).sum(1)
                if len(sums) > 1 and float(sums.max() - sums.min()) > 1e-6:
                    raise Coupled("weights of terms that add up to 1 over all rows")


# ---- in front of torch.autograd.backward

_waiting: weakref.WeakValueDictionary[int, LossCheck] = weakref.WeakValueDictionary()
_torch_backward = torch.autograd.backward


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    # inside a backward, a checkpointed block runs one of its own: it is part of the outer one
    if _waiting and torch._C._current_graph_task_id() == -1:
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if all(isinstance(root, torch.Tensor) and root.grad_fn is not None for root in roots):
            given = kwargs.get("grad_variables") if grad_tensors is None else grad_tensors
            gradients = [given] if given is None or isinstance(given, torch.Tensor) else list(given)
            gradients += [None] * (len(roots) - len(gradients))
            for check in tuple(_waiting.values()):
                check.before_backward(roots, gradients)
    try:
        _torch_backward(tensors, grad_tensors, *args, **kwargs)
    except BaseException:
        if torch._C._current_graph_task_id() == -1:
            tape.give_up()
        raise


def install() -> None:
    """Stand in front of ``torch.autograd.backward`` from here on."""
    torch.autograd.backward = _backward
