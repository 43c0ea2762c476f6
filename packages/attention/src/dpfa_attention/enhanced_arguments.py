"""What the research module's own arguments come to."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Any

from dpfa_attention.module import DPFlashAttention
from dpfa_attention.options import resolve
from dpfa_core.checks import one_of, require
from dpfa_core.contracts import TensorMechanism
from dpfa_core.plugin_names import named, parts
from dpfa_core.spending import first_party_accountants

MECHANISM = "pld"

PARAMETERS = {"rank": "low_rank", "sparsity": "sparse", "block_size": "block_diagonal"}
"""Parameter to the structure that has it."""

RANK = 16
"""Of low_rank, where none is given."""


def one_mechanism(**names: str | TensorMechanism | None) -> str | TensorMechanism:
    """The mechanism, which has several names that must agree."""
    found = {name: value for name, value in names.items() if value is not None}
    given = {name: str(value) if isinstance(value, str) else value for name, value in found.items()}
    first = next(iter(given), None)
    for name, value in given.items():
        require(
            value == given[str(first)],
            f"{name} must equal {first}={given[str(first)]!r}, which means the same",
            value,
            "Give one of them.",
        )
    return MECHANISM if first is None else given[first]


def structured(
    mechanism: str | TensorMechanism, noise_structure: str | None, head_dim: int, **given: float | None
) -> str | None:
    """`noise_structure` with the parameters that were given, checked against the heads' width.

    Raises: PrivacyParameterError for a parameter without its structure, or out of range.
    """
    structure = noise_structure
    if structure is None and mechanism == "structured_noise":
        structure = "low_rank"
    bare = parts(resolve(mechanism, structure)[0])[0] if isinstance(mechanism, str) else parts(structure or "")[0]
    for name, value in given.items():
        if value is None:
            continue
        wanted = PARAMETERS[name]
        require(bare == wanted, f"{name} needs noise_structure={wanted!r}", noise_structure, f"Or leave out {name}.")
        structure = named(structure or wanted, **{name: value})
    if bare == "low_rank":
        whole = dict(parts(structure or "low_rank")[1] if structure else parts(str(mechanism))[1])
        rank = whole.get("rank", RANK)
        require(
            isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= head_dim,
            f"rank must be an integer from 1 to head_dim={head_dim} (embed_dim / num_heads)",
            rank,
            f"Give a smaller rank; without one it is {RANK}.",
        )
    return structure


def accountant_named(composition_method: str | None) -> str | None:
    """The accountant that composes calls; None is the alias's own, or the least valid bound."""
    names = (None, "renyi", *first_party_accountants())
    one_of("composition_method", composition_method, names, 'None is the least valid bound, "renyi" is "rdp".')
    return "rdp" if composition_method == "renyi" else composition_method


def refuse_noise_site(module: Any) -> None:
    """Raises: PrivacyParameterError where noise on scores has no price, or values are declared for nothing."""
    one_of("noise_site", module.noise_site, ("output", "scores"))
    one_of("values", module.values, ("public", "private"))
    if module.noise_site == "output":
        require(
            module.values == "private",
            "values must be 'private' with noise_site='output', which covers them",
            module.values,
        )
        return
    planned = isinstance(module.noise_mechanism, str) and module.noise_structure is None
    name = parts(resolve(module.noise_mechanism)[0])[0] if planned else "another one"
    require(name == "gaussian", "noise_site='scores' needs gaussian noise without structure", name)
    for what, good, got in (
        ("setting='release'", module.setting == "release", module.setting),
        ("unit='sequence'", module.unit == "sequence", module.unit),
        ("a logit_bound", module.logit_bound is not None, module.logit_bound),
        ("no head_epsilons", module.head_epsilons is None, module.head_epsilons),
        ("checkpoint_gradients=False", not module.checkpoint_gradients, module.checkpoint_gradients),
        ("a finite epsilon", math.isfinite(module.epsilon), module.epsilon),
    ):
        require(good, f"noise_site='scores' needs {what}", got)


def refuse_unknown(kind: str, options: Iterable[str], own: Any) -> None:
    """Raises: TypeError for an option that neither the module nor its base has, with the nearest one that is."""
    known = [*inspect.signature(own).parameters, *inspect.signature(DPFlashAttention.__init__).parameters]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(set(known) - {'self'}))}."
            raise TypeError(f"{kind} got an unknown option {option!r}; {hint}")
