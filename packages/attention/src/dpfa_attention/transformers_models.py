"""A model of transformers whose attention is released: the terms, attached to each of its attention modules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dpfa_attention.functional import released
from dpfa_attention.module_arguments import one_token, refuse_without_sensitivity
from dpfa_attention.options import bound_of_logits, resolve
from dpfa_attention.privacy_spent import Calls, PrivacySpent
from dpfa_attention.tensor_release import tensor_mechanism
from dpfa_attention.transformers_attention import NAME, RAN, TERMS, refuse_weights, register_dp_attention
from dpfa_attention.upstream_gradients import UpstreamGradients, released_under
from dpfa_core.checks import one_of, require
from dpfa_core.errors import NotPrivateError
from dpfa_core.ledger import Ledger
from dpfa_core.registry import MECHANISMS
from dpfa_core.spec import PrivacySpec, Relation, Unit

_PROMISE = (
    *("queries", "clip_norm", "clip", "logit_bound", "mechanism", "noise_structure"),
    *("head_epsilons", "allow_infinite_heads", "backend", "seed"),
)
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_OTHERS = ("encoder_hidden_states", "key_value_states", "cross_attention_states")


def release_attention(
    model: nn.Module,
    *,
    epsilon: float,
    delta: float,
    unit: Unit = "sequence",
    relation: Relation = "replace",
    ledger: Ledger | None = None,
    upstream_gradients: UpstreamGradients = None,
    use_cache: bool = False,
    **promise: Any,
) -> ReleasedAttention:
    """Turn every attention of a transformers model into a release, on these terms.

    The model is changed in place: its attention is ``"dp_attention"`` from now on, each of its attention modules
    charges `epsilon` and `delta` at each call, and the calls of all layers compose in one ledger: a forward pass of
    12 layers is 12 releases. Another call of this function replaces the terms. In a layer whose forward does not come
    to the release, whatever the reason, the forward raises in the place of returning.

    What this does not cover is most of a transformer: residual connections carry the hidden states around each
    attention, so the model's output is not private for its input. ``check_release_paths`` names each such path.

    Guarantee: tested (as ``dp_flash_attn_func``; padded tokens change nothing; no attention runs without a release).
    Args:
        model: built with or without ``attn_implementation="dp_attention"``.
        epsilon, delta: of one call of one layer; a limit on all of them is the ledger's budget.
        ledger: where all layers are charged; None is ``process_ledger(unit, relation)``.
        upstream_gradients: as in ``DPFlashAttention``.
        use_cache: written into the model's configuration. True lets a cache of keys and values grow, so that each step
            of ``generate`` is a release of its new token's attention, charged like any other. The cache is private
            and must stay inside, and so must an output that holds it. With False a cache is refused.
        promise: mechanism, noise_structure, clip_norm, clip, logit_bound, queries (here "private"), head_epsilons,
            allow_infinite_heads, backend and seed, as in ``dp_flash_attn_func``.
    Returns: the account of these releases.
    Raises: PrivacyParameterError for terms that no call could use, or a model with an attention of its own.
    """
    register_dp_attention()
    require(
        isinstance(model, nn.Module) and hasattr(model, "set_attn_implementation"),
        "model must be one of transformers",
        type(model).__name__,
        "DPFlashAttention is the module for others.",
    )
    unknown = sorted(set(promise) - set(_PROMISE))
    require(not unknown, f"further terms must be among {', '.join(_PROMISE)}", ", ".join(unknown))
    one_of("upstream_gradients", upstream_gradients, (None, "block", "allow"))
    layers = dict(_attention_modules(model))
    terms = {"epsilon": epsilon, "delta": delta, "unit": unit, "relation": relation, "queries": "private"} | promise
    releases = ReleasedAttention(
        tuple(layers), terms, ledger=ledger, upstream_gradients=upstream_gradients, use_cache=use_cache
    )
    if model.config._attn_implementation != NAME:  # type: ignore[union-attr]
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    for name, layer in layers.items():
        found = _name_in(layer)
        require(found == NAME, f"the attention of {name} must be {NAME!r}", found, "Build the model with that name.")
    for inner in model.modules():
        for settings in (getattr(inner, "config", None), getattr(inner, "generation_config", None)):
            if hasattr(settings, "use_cache"):
                settings.use_cache = use_cache
        if hasattr(inner, "set_attn_implementation") and not hasattr(inner, TERMS):
            inner.register_forward_pre_hook(_entering_model, with_kwargs=True)
            setattr(inner, TERMS, releases)
    for layer in layers.values():
        if not hasattr(layer, TERMS):
            layer.register_forward_pre_hook(_entering, with_kwargs=True)
            layer.register_forward_hook(_leaving)
        setattr(layer, TERMS, releases)
    return releases


class ReleasedAttention:
    """The terms and the account of the releases of one model's attention; made by ``release_attention``."""

    def __init__(
        self,
        layers: tuple[str, ...],
        terms: dict[str, Any],
        *,
        ledger: Ledger | None,
        upstream_gradients: UpstreamGradients,
        use_cache: bool,
    ) -> None:
        self.layers = layers
        """The names of the attention modules."""
        self.terms, self.upstream_gradients, self.use_cache = dict(terms), upstream_gradients, use_cache
        spec = PrivacySpec(**{name: terms[name] for name in ("epsilon", "delta", "unit", "relation", "queries")})
        one_of("unit", spec.unit, ("sequence", "token"), "Examples and users are units of training.")
        given = {name: terms[name] for name in ("clip", "clip_norm", "logit_bound") if name in terms}
        private = not math.isinf(spec.epsilon) or terms.get("head_epsilons") is not None
        refuse_without_sensitivity(spec, one_token(1, 1, **given), private=private)
        self._calls = Calls(ledger, spec.unit, spec.relation)
        self._mechanism_and_accountant()

    def release(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, **call: Any) -> Tensor:
        """[B, S, H, D] from q [B, S, H, D] and k, v [B, Sk, Hk, D], charged and noted."""

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
            out, stats = released(q, k, v, return_privacy_stats=True, ledger=self._calls.given, **terms, **call)
            self._calls.add(stats.event_id)
            return out, stats

        terms = self.terms | {"logit_bound": bound_of_logits(softcap, self.terms.get("logit_bound"))}
        return released_under(self.upstream_gradients, run, q, k, v)[0]

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """What all calls of all layers cost together; see ``DPFlashAttention.get_privacy_spent``.

        `forward_count` counts releases: a forward pass makes as many as there are layers.
        """
        at = next(x for x in (delta, self._calls.ledger.delta, self.terms["delta"]) if x is not None)
        return self._calls.spent(at, *self._mechanism_and_accountant())

    def reset_privacy_accounting(self, reason: str | None = None) -> None:
        """As ``DPFlashAttention.reset_privacy_accounting``."""
        self._calls.new_period(reason or "")

    def _mechanism_and_accountant(self) -> tuple[str, str | None]:
        mechanism, structure = self.terms.get("mechanism", "gaussian"), self.terms.get("noise_structure")
        custom = tensor_mechanism(mechanism, structure)
        if custom is not None:
            return custom[0].name, None
        name, accountant = resolve(mechanism, structure)
        return MECHANISMS.entry(name).name, accountant


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that ask transformers' registry for their attention.

    Raises: PrivacyParameterError where there is none, or one that computes its attention by itself.
    """
    asking = {name: module for name, module in model.named_modules() if _asks_the_registry(type(module))}
    for name, module in model.named_modules():
        related = any(f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.") for other in asking)
        require(
            related or not name or "Attention" not in type(module).__name__,
            f"every attention of the model must come from transformers' AttentionInterface, which knows {NAME!r}",
            f"{name}, a {type(module).__name__} that computes its own",
            "Choose another model, or put a DPFlashAttention there.",
        )
    require(
        bool(asking),
        "model must have attention modules that use transformers' AttentionInterface",
        f"none in {type(model).__name__}",
    )
    yield from asking.items()


def _name_in(layer: nn.Module) -> str | None:
    return getattr(getattr(layer, "config", None), "_attn_implementation", None)


def _asks_the_registry(kind: type) -> bool:
    if hasattr(kind, "set_attn_implementation"):
        return False  # a model, which knows the registry and is no attention
    parts = (part for each in kind.__mro__ for part in vars(each).values())
    functions = (inspect.unwrap(part) for part in parts if inspect.isfunction(part))
    return any("ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names for function in functions)


def _entering_model(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if named.get("output_attentions") or model.config.output_attentions:  # type: ignore[union-attr]
        refuse_weights()


def _entering(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    releases: ReleasedAttention = getattr(layer, TERMS)
    setattr(layer, RAN, False)
    places = [*inspect.signature(type(layer).forward).parameters][1:]
    values = dict(zip(places, arguments, strict=False)) | named
    present = {name for name, value in values.items() if value is not None}
    others = sorted(present & set(_OTHERS))
    require(
        not others,
        f"{NAME} releases self-attention only",
        f"cross-attention in {type(layer).__name__} ({', '.join(others)})",
        "Choose a model without cross-attention.",
    )
    if not releases.use_cache and present & set(_CACHES):
        raise NotPrivateError(
            "a released model must run without a cache of keys and values, got one: they are functions of the records "
            "without noise, and the output would hold them; leave use_cache False, or call release_attention(..., "
            "use_cache=True) and keep caches, and outputs that hold one, inside."
        )


def _leaving(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    if not getattr(layer, RAN, False):
        raise NotPrivateError(
            f"the forward of this {type(layer).__name__} must come to {NAME!r}, got one that computed its attention "
            f"elsewhere: its attn_implementation is {_name_in(layer)!r} now; nothing of it was returned. Call "
            "release_attention again, which sets the name."
        )
