"""Recording a forward pass: every use of a trainable parameter is seen, whatever module it happens in.

While a recorded forward runs, and while its backward does (activation checkpointing computes again there),
proxies hang in the parameters' places. At any other time the module holds its own parameters, so copies,
state dicts and evaluation are untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dpfa_core.errors import NotPrivateError
from dpfa_training.per_sample import rule_for
from dpfa_training.per_sample.derived import Whole
from dpfa_training.per_sample.one_by_one import Slot, one_by_one
from dpfa_training.per_sample.survey import Log, compare
from dpfa_training.per_sample.uses import UnknownUse, Uses, sizes_of
from dpfa_training.tape import Tape

MASTERS = (torch.float32, torch.float64)
"""Dtypes that a trained parameter may have."""

ROUNDS = 12
"""Rounds of a survey: each finds what meets the batch one step further from the parameter."""

_log = logging.getLogger("dpfa_training")


class Recording:
    """Which parameters of `module` are trained, where they hang, and how each of their uses is laid out.

    Args:
        by_hook: ``start`` is called by a forward hook of the module, when it is too late to run the module
            itself once for each sample.

    Raises: NotPrivateError naming the first layer that cannot be covered.
    """

    def __init__(self, module: nn.Module, *, by_hook: bool = False) -> None:
        self.module = module
        self._by_hook = by_hook
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise NotPrivateError("nothing to train: no parameter has requires_grad=True; unfreeze some.")
        for name, parameter in self.parameters.items():
            if parameter.dtype not in MASTERS:
                raise NotPrivateError(
                    f"parameter {name!r} must be float32, got {parameter.dtype}; call module.float(), and use "
                    "autocast for bfloat16."
                )
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._identities = names.keys()
        self._slots: list[tuple[str, Slot]] = []
        self._ruled: list[tuple[nn.Module, dict[str, str]]] = []
        for path, layer in module.named_modules():
            _check(path, layer)
            own = {attribute: names[id(p)] for attribute, p in layer._parameters.items() if id(p) in names}
            if own and isinstance(layer, nn.RNNBase):
                raise NotPrivateError(
                    f"{path or 'the module'} is a {type(layer).__name__}, which keeps its weights out of sight; "
                    "freeze it, or use attention."
                )
            rule = rule_for(layer) if own else None
            if rule is None:
                self._slots += [(path, (layer, attribute, name)) for attribute, name in own.items()]
                continue
            reason = rule.refusal(layer)
            if reason:
                raise NotPrivateError(f"{path!r} ({type(layer).__name__}) cannot be trained privately: {reason}.")
            self._ruled.append((layer, own))
        self._uses = Uses()
        self._proxies: dict[str, Whole] = {}
        self._alone: list[str] = []
        """Paths of the modules that run once for each sample."""
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._tape: Tape | None = None
        self._hung = False
        """Whether stand-ins are in the places of the parameters."""
        self.surveyed = False

    @property
    def anchor(self) -> torch.Tensor:
        """What every tensor depends on that a recorded forward computes with a parameter."""
        return self._uses.anchor

    # ---- what is used, and how

    def survey(self, forward: Callable[[list[int]], Any], samples: int, inputs: Any = None) -> None:
        """Find how every use of a parameter is laid out; `forward(rows)` runs the module on these of `inputs`.

        Without `inputs`, sequences that are flattened must keep their length from here on.

        Guarantee: tested (also where the batch is as long as a sequence).
        Raises: NotPrivateError naming a parameter whose use has neither a rule nor an exact fallback.
        """
        known = list(self._alone)
        self._uses.surveyed = sizes_of(inputs)
        while True:
            try:
                self._survey(forward, samples)
                break
            except UnknownUse as unknown:
                self._fall_back(unknown)
        for path in self._alone:
            if path not in known:
                numbers = sum(self.parameters[name].numel() for name in self._names_below(path))
                _log.warning(
                    "%s has no rule for all its parameters and runs once for each sample: exact, but B forwards "
                    "and B x %d numbers of memory for a batch of B.",
                    path or "the module",
                    numbers,
                )
        self.surveyed = True

    def _survey(self, forward: Callable[[list[int]], Any], samples: int) -> None:
        self._uses.layouts = {}
        for _ in range(ROUNDS):
            least = [*range(samples)] if samples > 1 else [0, 0]  # a dimension of 1 takes other ways through torch
            few, more = Log(len(least), twins=False), Log(len(least) + 1, twins=True)
            for log, rows in ((few, least), (more, [0, *least])):
                self._install(None, log)
                try:
                    with torch.enable_grad(), log.counting:
                        output = forward(rows)
                        if log.passed_over:
                            _backward(output)
                finally:
                    self.stop()
            layouts, refused = compare(few, more)
            for key, reason in refused.items():
                raise UnknownUse((more.owners | few.owners)[key], *key[:2], reason)
            if layouts == self._uses.layouts:
                _check_operations(few, more)
                return
            self._uses.layouts = layouts
        raise NotPrivateError("the module must use its parameters in the same way for every batch, got another way.")

    def _fall_back(self, unknown: UnknownUse) -> None:
        owners = {path for path, (_, _, name) in self._slots if name in unknown.parameters}
        lifted = set()
        for path in owners:
            above = [known for known in self._alone if _below(path, known)]
            if "" in above:
                raise unknown
            lifted.add(above[0].rpartition(".")[0] if above else path)
        if self._by_hook and "" in lifted:
            raise NotPrivateError(
                f"{unknown} Or wrap the module in another (nn.Sequential(module)), which can run it once for each "
                "sample."
            )
        kept = {known for known in self._alone if not any(_below(known, path) for path in lifted)}
        self._alone = sorted(kept | {path for path in lifted if not any(_below(path, p) for p in lifted - {path})})

    def _names_below(self, path: str) -> set[str]:
        return {name for own, (_, _, name) in self._slots if _below(own, path)}

    def check_parameters(self) -> None:
        """Whether the module trains what it did when it was built.

        Raises: NotPrivateError naming a parameter that was added, replaced, unfrozen, frozen or cast since.
        """
        # by hand, as named_parameters() takes ten times as long, and this runs before every forward
        trained: dict[int, nn.Parameter] = {}
        layers, seen = [self.module], {id(self.module)}
        while layers:
            layer = layers.pop()
            trained.update({id(p): p for p in layer._parameters.values() if p is not None and p.requires_grad})
            inner = [child for child in layer._modules.values() if child is not None and id(child) not in seen]
            seen.update(map(id, inner))
            layers += inner
        if trained.keys() == self._identities and all(p.dtype in MASTERS for p in trained.values()):
            return
        known = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        new = [name for name, p in known.items() if id(p) not in self._identities]
        gone = [name for name, p in self.parameters.items() if id(p) not in trained]
        cast = [f"{name!r} in {p.dtype}" for name, p in known.items() if p.dtype not in MASTERS]
        problem = f"{new} besides them" if new else f"all but {gone}" if gone else ", ".join(cast)
        raise NotPrivateError(
            f"the module must train the parameters that it had when it was made private, got {problem}; a parameter "
            "that was added or unfrozen would get no noise. Call engine_of(module).detach(), change the module, and "
            "make it private again with the same ledger."
        )

    # ---- while it runs

    def start(self, tape: Tape, inputs: Any = None) -> None:
        """From here, forwards of `inputs` write to `tape`, until ``stop``; its backward starts and stops it again."""
        for device in {parameter.device.type for parameter in self.parameters.values()}:
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
                raise NotPrivateError(
                    "autocast must be bfloat16, got float16, whose loss scaling hides the gradients' size; use "
                    "torch.autocast(device, dtype=torch.bfloat16) and no GradScaler."
                )
        if not self.surveyed:
            raise NotPrivateError("the module must go through a survey before it is recorded; call survey first.")
        self._uses.sizes = sizes_of(inputs)
        self._install(tape, None)
        proxies = self._proxies

        def again() -> None:
            self.stop()
            self._proxies = proxies
            self._hang()

        tape.on_begin, tape.on_end = again, self.stop
        self._tape = tape

    def recorded(self, output: Any) -> None:
        """The forward that ``start`` began is over: its `output` leads to the backward that belongs to it."""
        tape, self._tape = self._tape, None
        self.stop()
        if tape is not None:
            tape.watch(output)

    def _install(self, tape: Tape | None, log: Log | None) -> None:
        self.stop()
        uses = replace(self._uses, log=log, tape=tape)
        self._proxies = {}
        for name, parameter in self.parameters.items():
            proxy = Whole.over(parameter, name, (name,), uses)
            proxy.original = parameter
            self._proxies[name] = proxy
        self._hang()

    def _hang(self) -> None:
        self._hung = True
        uses = next(iter(self._proxies.values())).uses
        for _, (owner, attribute, name) in self._slots:
            owner._parameters[attribute] = self._proxies[name]  # type: ignore[assignment]
        for layer, names in self._ruled:
            if uses.tape is not None:
                rule = rule_for(layer)
                assert rule is not None  # noqa: S101  (found when the recording was built)
                self._replace(layer, rule.forward(layer, names, uses.tape, uses.anchor))
        for path in self._alone:
            layer = self.module.get_submodule(path)
            slots = [slot for own, slot in self._slots if _below(own, path)]
            self._replace(layer, one_by_one(path, layer.forward, slots, self._proxies))

    def _replace(self, layer: nn.Module, forward: Any) -> None:
        self._replaced.append((layer, layer.__dict__.get("forward")))
        layer.__dict__["forward"] = forward

    def stop(self) -> None:
        """Put every parameter and forward back; does nothing where they are in place."""
        if not self._hung:
            return
        self._hung = False
        for _, (owner, attribute, name) in self._slots:
            owner._parameters[attribute] = self.parameters[name]
        for layer, before in reversed(self._replaced):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.__dict__["forward"] = before
        self._replaced.clear()

    @contextmanager
    def to(self, tape: Tape, inputs: Any = None) -> Iterator[None]:
        """``start`` and ``stop`` around a forward; its backward must run inside, or ``tape.watch`` its output."""
        self.start(tape, inputs)
        try:
            yield
        finally:
            self._tape = None
            self.stop()


def _check_operations(few: Log, more: Log) -> None:
    if few.counting.operations != more.counting.operations:
        raise NotPrivateError(
            f"the module must treat its batch as a whole, got {few.counting.operations} operations for {few.rows} "
            f"samples and {more.counting.operations} for {more.rows}; take the loop over samples out of its forward."
        )


def _backward(output: Any) -> None:
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])


def _below(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _check(path: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise NotPrivateError(
            f"{path or 'the module'} is a {kind}, which couples the samples of a batch; use LayerNorm or GroupNorm."
        )
    if hasattr(layer, "_orig_mod"):
        raise NotPrivateError(
            f"{path or 'the module'} is compiled, which this version does not offer; pass the module "
            "as it was before torch.compile."
        )
    if isinstance(layer, torch.jit.ScriptModule):
        raise NotPrivateError(
            f"{path or 'the module'} is a ScriptModule, whose parameters cannot be seen; pass it as Python."
        )
