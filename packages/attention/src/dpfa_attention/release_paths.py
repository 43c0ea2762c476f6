"""Which private inputs reach the outside of a module without a release."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpfa_attention import functional
from dpfa_attention.adaptive_clip import Moved
from dpfa_attention.stats import PrivacyStats
from dpfa_attention.tensor_release import Found
from dpfa_attention.terms import Terms, agreed
from dpfa_core.checks import require
from dpfa_core.contracts import TensorMechanism
from dpfa_core.ledger import Ledger
from dpfa_core.spec import PrivacySpec

MASKS = ("attention_mask", "attn_mask", "key_padding_mask")
"""Inputs that are public unless said otherwise: masks are equal for neighbours (PRIVACY P1)."""

_FRESH = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_")
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class LeakingPath:
    """One way from a private input to the outside that meets no release."""

    kind: Literal["output", "buffer", "attribute", "python value", "gradient"]
    where: str
    """Which output ("[1]", "['loss']"), buffer or attribute ("norm.running_mean")."""
    source: str
    """The input it comes from: "input 0", "input 'ids'"."""
    steps: tuple[str, ...]
    """The shortest way: "module: operation", with "(top)" for the checked module's own code."""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}: {' -> '.join((self.source, *self.steps))}"


@dataclasses.dataclass(frozen=True)
class ReleasePaths:
    """The answer of ``check_release_paths``; true where no path avoids a release."""

    leaks: tuple[LeakingPath, ...]
    releases: tuple[str, ...]
    """The module of each release that was met, in order."""

    def __bool__(self) -> bool:
        return not self.leaks

    def __str__(self) -> str:
        where = ", ".join(self.releases) or "none"
        if self:
            return f"every path from a private input to the outside passes a release (in {where})."
        return "\n".join((f"{len(self.leaks)} paths avoid a release (releases: {where}):", *map(str, self.leaks)))


def check_release_paths(
    module: nn.Module, *inputs: Any, public_inputs: Collection[int | str] = MASKS, **kwargs: Any
) -> ReleasePaths:
    """Run `module` once and follow its inputs, operation by operation, to all that is left outside.

    A release ends a path: in this run it returns zeros, charges nothing and draws no noise. Outside are what
    the module returns, buffers and parameters that its forward changes, tensors that it keeps on itself or on a
    submodule, Python numbers that it reads off a tensor (``item()``, ``if``), and gradients, where gradients are
    enabled and a release lets a backward pass on into what comes before it. A call without noise is no
    release, nor is one whose mechanism finishes tensors and does not say, by ``dp_event``, what that costs.

    What a run cannot show is not found: branches that these inputs do not take, ``tolist()`` and ``numpy()``,
    values kept elsewhere (a global, a file, an object of another class), compiled submodules. Memory is followed as
    a whole: a tensor that was once written with private values stays private. Use made-up inputs, with the shapes
    and branches of real ones. Buffers that the run changes are put back; random state and what else the forward
    touches are not.

    Guarantee: tested (finds planted leaks of each kind; passes blocks without one).
    Args:
        inputs, kwargs: of one call; every tensor in them is private.
        public_inputs: except those at these places or of these names; masks by default.
    Returns: the paths, one for each place outside; false if there is any.
    Raises: PrivacyParameterError for a public input that there is not, or inputs without a tensor, of which nothing
        could be found; what the module raises.
    Source: PRIVACY P9.
    """
    given = dict([*enumerate(inputs), *kwargs.items()])
    require(isinstance(module, nn.Module), "module must be an nn.Module", type(module).__name__)
    places = isinstance(public_inputs, Collection) and not isinstance(public_inputs, str)
    unknown = sorted(map(repr, set(public_inputs) - {*given, *MASKS})) if places else [repr(public_inputs)]
    require(
        not unknown,
        f"public_inputs must hold places or names of the inputs, {[*given]}",
        ", ".join(unknown),
        'One of them: public_inputs=["memory"].',
    )
    require(
        any(True for value in given.values() for _ in _tensors(value)),
        "inputs must hold a tensor to follow",
        ", ".join(type(value).__name__ for value in given.values()) or "none",
        "Made-up ones will do.",
    )
    names = {module_: name or "(top)" for name, module_ in module.named_modules()}
    kept = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    trace = _Trace()
    for place, value in given.items():
        if place not in public_inputs:
            for tensor in _tensors(value):
                trace.begin(tensor, f"input {place!r}")
    handles = []
    for inner, name in names.items():
        handles.append(inner.register_forward_pre_hook(_entering(trace, name), prepend=True))
        handles.append(inner.register_forward_hook(_leaving(trace), always_call=True))
    try:
        with _LOCK, _releases_end_paths(trace), trace:
            result = module(*inputs, **kwargs)
        leaks = [*_outside(module, result, trace, kept), *trace.read]
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in kept and buffer.shape == kept[name].shape:
                    buffer.copy_(kept[name])
    return ReleasePaths(tuple(leaks), tuple(trace.releases))


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks every tensor that was computed from a private input, with the shortest way to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ways: dict[int, tuple[str, ...]] = {}
        """From a storage to (source, step, step ...)."""
        self.alive: list[Any] = []  # a storage that is freed would give its number to another one
        self.modules: list[str] = []
        self.releases: list[str] = []
        self.read: list[LeakingPath] = []

    def begin(self, tensor: Tensor, source: str) -> None:
        self._mark(tensor, (source,))

    def way(self, tensor: Tensor) -> tuple[str, ...] | None:
        return self.ways.get(_storage(tensor))

    def module(self) -> str:
        return self.modules[-1] if self.modules else "(top)"

    def ended_by_a_release(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Zeros that depend on nothing; notes the release, and a gradient that would flow back through it."""
        where = self.module()
        self.releases.append(where)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            self.read.append(LeakingPath("gradient", f"into what is before {where}", "a backward pass", ()))
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        ways = [way for tensor in _tensors((args, kwargs)) if (way := self.way(tensor)) is not None]
        if not ways or name.startswith(_FRESH):
            self.alive += [tensor.untyped_storage() for tensor in _tensors(out)]
            return out
        step = f"{self.module()}: {name}"
        shortest = min(ways, key=len)
        way = shortest if shortest[-1] == step else (*shortest, step)
        written = [*_tensors(out), *_written(func, name, args, kwargs)]
        for tensor in written:
            self._mark(tensor, way)
        if not written and out is not None:
            self.read.append(LeakingPath("python value", f"in {self.module()}", way[0], way[1:]))
        return out

    def _mark(self, tensor: Tensor, way: tuple[str, ...]) -> None:
        self.alive.append(tensor.untyped_storage())
        self.ways.setdefault(_storage(tensor), way)


class _WithoutNoise:
    """A mechanism that works on tensors, in all but its noise; what it is asked for goes to the one it stands for."""

    def __init__(self, mechanism: TensorMechanism) -> None:
        self._mechanism = mechanism

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mechanism, name)

    def add_noise(self, tensor: Tensor, sensitivity: float, epsilon: float) -> Tensor:
        return tensor


def _written(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Arguments that the operation changes."""
    for place, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        changes = argument.alias_info is not None and argument.alias_info.is_write
        # batch norms change these without saying so, where they train
        if "batch_norm" in name and argument.name in ("running_mean", "running_var"):
            training = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
            changes = changes or bool(training.get("training", training.get("train", True)))
        if changes:
            yield from _tensors(value)


@contextmanager
def _releases_end_paths(trace: _Trace) -> Iterator[None]:
    """In here a release is zeros that depend on nothing, and goes to a ledger that is thrown away."""
    names, here = vars(functional), threading.get_ident()
    before = {name: names[name] for name in ("release", "draw", "tensor_release", "moved_clip", "ledger_numbered")}
    release, draw, tensor_release, moved_clip, ledger_numbered = before.values()
    scratch: list[Ledger] = []

    def ends(q: Tensor, k: Tensor, v: Tensor, ticket: Tensor, *values: Any) -> Tensor:
        plan = agreed(q, k, v, *Terms.parted(values)).priced.plan
        elsewhere = threading.get_ident() != here  # another thread's call is a release, as ever
        if elsewhere or plan.distribution == "none" or plan.noiseless_heads:
            released: Tensor = release(q, k, v, ticket, *values)
            return released
        return trace.ended_by_a_release(q, k, v)

    def finished(
        q: Tensor, k: Tensor, v: Tensor, found: Found, spec: PrivacySpec, ledger: int, **rest: Any
    ) -> tuple[Tensor, PrivacyStats]:
        if threading.get_ident() != here:
            noised: tuple[Tensor, PrivacyStats] = tensor_release(q, k, v, found, spec, ledger, **rest)
            return noised
        scratch.append(Ledger.memory(unit=spec.unit, relation=spec.relation))
        entry, mechanism = found
        out, stats = tensor_release(q, k, v, (entry, _WithoutNoise(mechanism)), spec, scratch[-1].number, **rest)
        # a mechanism that does not say what its noise costs promises nothing, so its output leaks
        return (trace.ended_by_a_release(q, k, v) if math.isfinite(stats.epsilon_spent) else out), stats

    def uncharged(q: Tensor, k: Tensor, v: Tensor, terms: Terms, bias: Tensor | None = None) -> Tensor:
        if threading.get_ident() == here:
            scratch.append(Ledger.memory(unit=terms.unit, relation=terms.relation, delta=terms.ledger_delta or None))
            terms = terms._replace(ledger=scratch[-1].number)
        ticket: Tensor = draw(q, k, v, terms, bias)
        return ticket

    def unmoved(v: Tensor, lengths: Any, clip_norm: float, **budget: Any) -> Moved:
        if threading.get_ident() != here:
            counted: Moved = moved_clip(v, lengths, clip_norm, **budget)
            return counted
        return Moved(clip_norm, 0.0, 0.0, "")

    def thrown_away(number: int, spec: PrivacySpec) -> Ledger:
        if threading.get_ident() != here:
            kept: Ledger = ledger_numbered(number, spec)
            return kept
        scratch.append(Ledger.memory(unit=spec.unit, relation=spec.relation))
        return scratch[-1]

    names |= {"release": ends, "draw": uncharged, "tensor_release": finished}
    names |= {"moved_clip": unmoved, "ledger_numbered": thrown_away}
    try:
        yield
    finally:
        names |= before


def _outside(module: nn.Module, result: Any, trace: _Trace, kept: Mapping[str, Tensor]) -> Iterator[LeakingPath]:
    for path, leaf in _leaves(result):
        yield from _leak("output", path or "(the tensor returned)", leaf, trace)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in [*module.named_buffers(remove_duplicate=False), *parameters.items()]:
        yield from _leak("buffer", name, tensor, trace)
    registered = {id(tensor) for tensor in [*parameters.values(), *module.buffers()]}
    for prefix, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for path, leaf in _leaves(value):
                if id(leaf) not in registered:
                    yield from _leak("attribute", f"{prefix}.{name}{path}".lstrip("."), leaf, trace)


def _leak(kind: Any, where: str, tensor: Tensor, trace: _Trace) -> Iterator[LeakingPath]:
    way = trace.way(tensor)
    if way is not None:
        yield LeakingPath(kind, where, way[0], way[1:])


def _entering(trace: _Trace, name: str) -> Callable[..., None]:
    return lambda *_: trace.modules.append(name)


def _leaving(trace: _Trace) -> Callable[..., None]:
    def leave(*_: Any) -> None:
        trace.modules.pop()

    return leave


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers and dataclasses, with its path."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        place = pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield place, leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                for inner, tensor in _leaves(getattr(leaf, field.name)):
                    yield f"{place}.{field.name}{inner}", tensor
        elif isinstance(leaf, Mapping):
            for key, item in leaf.items():
                for inner, tensor in _leaves(item):
                    yield f"{place}[{key!r}]{inner}", tensor
