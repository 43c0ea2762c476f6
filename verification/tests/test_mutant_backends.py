"""Backends with one fault each: every obligation of a backend rejects at least one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dpfa_core.contracts import CounterLayout
from dpfa_kernels_torch import attention
from dpfa_kernels_torch.backend import TorchBackend
from dpfa_verification.conformance.backend import BackendExamination
from dpfa_verification.conformance.bench import NO_TENSORS, Bench
from dpfa_verification.conformance.level import LEVELS
from dpfa_verification.conformance.noise import NoiseExamination
from dpfa_verification.conformance.obligation import obligations, verdict
from dpfa_verification.conformance.privatize import PrivatizeExamination
from dpfa_verification.conformance.release import ReleaseExamination
from dpfa_verification.conformance.training import TrainingExamination

TRUE = TorchBackend()
QUICK = LEVELS["quick"]


class Mutant(TorchBackend):
    """The true backend with some methods replaced; a replacement is given the true one first."""

    def __init__(self, **changes: Callable[..., Any]) -> None:
        for name, change in changes.items():
            setattr(self, name, partial(change, getattr(TRUE, name)))


def examinations(backend: TorchBackend) -> list[Any]:
    bench = Bench("cpu", seed=20261)
    return [
        BackendExamination(backend, bench),
        ReleaseExamination(backend, bench, QUICK),
        PrivatizeExamination(backend, bench, QUICK),
        NoiseExamination(backend, bench, QUICK, "release"),
        TrainingExamination(backend, bench, QUICK),
    ]


def with_problem(**fields: Any) -> Callable[..., Any]:
    """A release that runs another problem than it was given."""
    return lambda true, q, k, v, problem, *rest, **scale: true(q, k, v, replace(problem, **fields), *rest, **scale)


def with_plan(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda true, q, k, v, problem, plan, *rest, **scale: true(q, k, v, problem, change(plan), *rest, **scale)


def with_key(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda true, *arguments, **scale: true(*arguments[:-1], change(arguments[-1]), **scale)


def zeroed(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x.view(torch.uint8)).view(x.dtype)


def scaled_noise(plan: Any, factor: float) -> Any:
    return replace(plan, head_scale=tuple(factor * scale for scale in plan.head_scale))


def one_head_for_all(true: Any, *arguments: Any, **scale: Any) -> Any:
    out, saved = true(*arguments, **scale)
    return (out[:, :, :1].expand_as(out).clone(), saved) if arguments[4].distribution != "none" else (out, saved)


def sometimes_other_noise(true: Any, *arguments: Any, **scale: Any) -> Any:
    out, saved = true(*arguments, **scale)
    return out + 1e-3 * torch.rand_like(out), saved


def uniform_noise(true: Any, *arguments: Any, **scale: Any) -> Any:
    out, saved = true(*arguments, **scale)
    plan = arguments[4]
    return ((torch.rand_like(out) - 0.5) * 12**0.5 * plan.head_scale[0], saved)


def long_rows(true: Any, *arguments: Any, **scale: Any) -> Any:
    out, saved = true(*arguments, **scale)
    return out * 1.05, saved


def spoiled_by_nan(true: Any, q: Any, k: Any, v: Any, *rest: Any, **scale: Any) -> Any:
    out, saved = true(q, k, v, *rest, **scale)
    return out + 0 * (q.sum() + k.sum() + v.sum()), saved


def overwriting(true: Any, q: Any, *rest: Any, **scale: Any) -> Any:
    result = true(q, *rest, **scale)
    q.zero_()
    return result


def mean_where_nothing_is_seen(true: Any, q: Any, k: Any, v: Any, *rest: Any, **scale: Any) -> Any:
    out, saved = true(q, k, v, *rest, **scale)
    return torch.where(out == 0, torch.full_like(out, 0.1), out), saved


def clip_forgotten(true: Any, *arguments: Any, clip_rows: bool) -> Any:
    return true(*arguments, clip_rows=False)


def not_in_place(true: Any, x: Any, *rest: Any, clip_rows: bool) -> Any:
    return true(x.clone(), *rest, clip_rows=clip_rows)


def with_weights(change: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A release whose unnormalised weights are made of (logits, visible, logit bound) by `change`."""

    def changed(true: Any, *arguments: Any, **scale: Any) -> Any:
        with patch.object(attention, "softmax_weights", lambda *given: (change(*given), None)):
            return true(*arguments, **scale)

    return changed


def mask_before_the_bound(logits: torch.Tensor, visible: torch.Tensor, bound: float | None) -> torch.Tensor:
    logits = logits.masked_fill(~visible, -torch.inf)
    if bound is not None:
        logits = bound * torch.tanh(logits / bound)  # a hidden key has the lowest logit now, and a weight
    return torch.exp(logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0))


def row_maximum(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Weights that are rounded to `dtype` after the row's maximum, which is private, is taken off."""

    def weights(logits: torch.Tensor, visible: torch.Tensor, bound: float | None) -> torch.Tensor:
        logits = logits if bound is None else bound * torch.tanh(logits / bound)
        logits = logits.masked_fill(~visible, -torch.inf)
        return torch.exp(logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).to(dtype).float()

    return weights


def one_key_after_the_other(true: Any, *arguments: Any, **scale: Any) -> Any:
    """Weighted values, added up in the order of the keys."""

    def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        shares = attention._shares(q, k, *rest)[1]
        groups = shares.shape[2]
        terms = shares.flatten(1, 2).permute(0, 2, 3, 1).unsqueeze(-1) * v.repeat_interleave(groups, 2).unsqueeze(1)
        return in_order(terms, 2)

    with patch.object(attention, "attention_rows", rows):
        return true(*arguments, **scale)


def weights_one_after_the_other(true: Any, *arguments: Any, **scale: Any) -> Any:
    """The weights' sum, likewise: it divides all of them."""
    exact = attention._shares

    def shares(*given: Any) -> Any:
        logits, _, slopes = exact(*given)
        weights, _ = attention.softmax_weights(logits, given[2][:, None, None], given[3])
        return logits, weights / in_order(weights, -1).unsqueeze(-1), slopes

    with patch.object(attention, "_shares", shares):
        return true(*arguments, **scale)


def in_order(terms: torch.Tensor, dim: int) -> torch.Tensor:
    array = terms.movedim(dim, 0).numpy()
    return torch.from_numpy(np.add.accumulate(array, axis=0)[-1])


def gradient_without_keys(true: Any, dout: Any, saved: Any) -> Any:
    dq, dk, dv = true(dout, saved)
    return dq, torch.zeros_like(dk), dv


def layout_with(change: Callable[[CounterLayout], CounterLayout]) -> Callable[..., Any]:
    return lambda true, op, **choice: change(true(op, **choice))


def without_last_lane_term(layout: CounterLayout) -> CounterLayout:
    return replace(layout, lane=layout.lane[:-1])


def without_first_word_term(layout: CounterLayout) -> CounterLayout:
    return replace(layout, words=(layout.words[0][1:], *layout.words[1:]))


def unbounded_rows(layout: CounterLayout) -> CounterLayout:
    fields = tuple((name, 2**40 if name == "row" else bound) for name, bound in layout.fields)
    longer = tuple(replace(term, bits=36) if term.field == "row" and term.low_bit else term for term in layout.words[0])
    words = (longer, *layout.words[1:])
    if not any(term.field == "row" for term in layout.words[0]):
        longer = tuple(replace(term, bits=40) if term.field == "row" else term for term in layout.words[1])
        words = (layout.words[0], longer, *layout.words[2:])
    return replace(layout, fields=fields, words=words)


def below(true: Any, kind: str, saved: Any, **method: Any) -> Any:
    return true(kind, saved, **method) * 0.999


def far_above(true: Any, kind: str, saved: Any, **method: Any) -> Any:
    return true(kind, saved, **method) * 1.01


def cancelling(true: Any, kind: str, saved: Any, **method: Any) -> Any:
    """Gradients summed in bfloat16: what is left of a sum that cancels is noise."""
    if kind == "linear":
        rounded = torch.einsum("btp,btd->bpd", saved[1].bfloat16(), saved[0].bfloat16())
        return torch.minimum(rounded.float().square().sum((1, 2)), true(kind, saved, **method))
    return true(kind, saved, **method)


def finite_anyway(true: Any, kind: str, saved: Any, **method: Any) -> Any:
    return torch.nan_to_num(true(kind, saved, **method), posinf=0.0)


def factors_in_bfloat16(true: Any, kind: str, saved: Any, factors: Any) -> Any:
    return true(kind, saved, factors.bfloat16().float())


def poisoned_sum(true: Any, kind: str, saved: Any, factors: Any) -> Any:
    spoilt = sum(x.sum() * 0 for x in saved if isinstance(x, torch.Tensor) and x.is_floating_point())
    return true(kind, saved, factors) + spoilt


def in_bfloat16(true: Any, kind: str, saved: Any, **rest: Any) -> Any:
    return true(kind, tuple(x.bfloat16().float() for x in saved), **rest)


def beside_the_total(true: Any, total: Any, *rest: Any) -> Any:
    return true(total.clone(), *rest)


def overwriting_the_total(true: Any, total: Any, *rest: Any) -> Any:
    return true(total.zero_(), *rest)


def training(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """add_noise_ with some of its arguments changed."""

    def changed(true: Any, grad: Any, std: float, key: Any, **rest: Any) -> Any:
        given = {"std": std, "key": key, **rest}
        given |= {name: change(given.get(name, 0)) for name, change in changes.items()}
        return true(grad, given.pop("std"), given.pop("key"), **given)

    return changed


def replaced_by_noise(true: Any, grad: Any, std: float, key: Any, **rest: Any) -> Any:
    return true(grad.zero_(), std, key, **rest)


def noise_at_std_zero(true: Any, grad: Any, std: float, key: Any, **rest: Any) -> Any:
    return true(grad, max(std, 1e-3), key, **rest)


def turned_round(true: Any, grad: Any, std: float, key: Any, **rest: Any) -> Any:
    return grad.add_(true(torch.zeros_like(grad), std, key, **rest), alpha=-1)


def keyless(key: Any) -> Any:
    return replace(key, words=zeroed(key.words))


def always_first(key: Any) -> Any:
    return replace(key, release=zeroed(key.release))


def low_half(key: Any) -> Any:
    return replace(key, release=(key.release.view(torch.int64) & 0xFFFF).view(torch.uint64))


MUTANTS: list[tuple[str, dict[str, Callable[..., Any]]]] = [
    ("contract", {"supports": lambda true, op, problem, plan: ()}),
    ("contract", {"counter_layout": lambda true, op: None}),
    ("attention", {"release": with_problem(logit_bound=None)}),
    ("attention", {"release": with_problem(causal=False)}),
    ("attention", {"release": with_problem(lengths=())}),
    ("attention", {"release": overwriting}),
    ("clip", {"release": long_rows}),
    ("clip", {"release": with_plan(lambda plan: replace(plan, norm="l2"))}),
    ("backward", {"release_backward": gradient_without_keys}),
    ("backward", {"release_backward": lambda true, dout, saved: true(dout, saved._replace(norm="l1"))}),
    ("poison", {"release": spoiled_by_nan}),
    ("nothing_visible", {"release": mean_where_nothing_is_seen}),
    ("hidden_keys", {"release": with_weights(mask_before_the_bound)}),
    ("long_sums", {"release": one_key_after_the_other}),
    ("long_sums", {"release": weights_one_after_the_other}),
    ("token_rounding", {"release": with_weights(row_maximum(torch.bfloat16))}),
    ("token_rounding", {"release": with_weights(row_maximum(torch.float16))}),
    ("privatize_clip", {"privatize_": clip_forgotten}),
    ("privatize_clip", {"privatize_": not_in_place}),
    ("epilogue", {"privatize_": with_key(keyless)}),
    ("noise_law", {"release": with_plan(lambda plan: scaled_noise(plan, 0.97))}),
    ("noise_law", {"release": uniform_noise}),
    ("laplace_law", {"release": with_plan(lambda plan: scaled_noise(plan, 0.95))}),
    ("laplace_law", {"release": with_plan(lambda plan: replace(plan, distribution="gaussian"))}),
    ("noise_scale", {"release": with_plan(lambda plan: replace(plan, row_scale=(1.0,)))}),
    ("noise_scale", {"release": with_plan(lambda plan: replace(plan, head_scale=plan.head_scale[::-1]))}),
    ("noise_repeats", {"release": sometimes_other_noise}),
    ("noise_depends_on_key", {"release": with_key(keyless)}),
    ("noise_depends_on_release", {"release": with_key(always_first)}),
    ("noise_depends_on_release", {"release": with_key(low_half)}),
    ("noise_used_once", {"release": one_head_for_all}),
    ("noise_used_once", {"release": with_key(always_first)}),
    ("noise_bits", {"release": with_plan(lambda plan: scaled_noise(plan, 0.999))}),
    ("counter_map", {"counter_layout": layout_with(without_first_word_term)}),
    ("counter_injective", {"counter_layout": layout_with(without_last_lane_term)}),
    ("counter_injective", {"counter_layout": layout_with(without_first_word_term)}),
    ("counter_injective", {"counter_layout": layout_with(unbounded_rows)}),
    ("sqnorm", {"sqnorm": below}),
    ("sqnorm", {"sqnorm": far_above}),
    ("sqnorm_cancellation", {"sqnorm": cancelling}),
    ("sqnorm_not_finite", {"sqnorm": finite_anyway}),
    ("clipped_grad", {"clipped_grad": factors_in_bfloat16}),
    ("clipped_grad", {"clipped_grad": lambda true, *arguments: true(*arguments).bfloat16().float()}),
    ("clipped_grad_leaves_out", {"clipped_grad": poisoned_sum}),
    ("per_sample_grad", {"per_sample_grad": in_bfloat16}),
    ("per_sample_grad", {"add_clipped_grad_": beside_the_total}),
    ("per_sample_grad", {"add_clipped_grad_": overwriting_the_total}),
    ("training_noise_law", {"add_noise_": training(std=lambda std: 0.97 * std)}),
    ("training_noise_adds", {"add_noise_": replaced_by_noise}),
    ("training_noise_adds", {"add_noise_": noise_at_std_zero}),
    ("training_noise_shards", {"add_noise_": training(first_element=lambda first: 0)}),
    ("training_noise_shards", {"add_noise_": training(first_element=lambda first: first // 2 * 2)}),
    ("training_noise_fresh", {"add_noise_": training(key=keyless)}),
    ("training_noise_fresh", {"add_noise_": training(parameter=lambda parameter: 0)}),
    ("training_noise_fresh", {"add_noise_": training(step=lambda step: step % 2**32)}),
    ("training_noise_fresh", {"add_noise_": training(first_element=lambda first: first % 2**32)}),
    ("training_noise_bits", {"add_noise_": turned_round}),
    ("training_counter_injective", {"counter_layout": layout_with(without_first_word_term)}),
]


@pytest.mark.parametrize(("name", "changes"), MUTANTS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MUTANTS)])
def test_the_obligation_rejects_the_mutant(name: str, changes: dict[str, Callable[..., Any]]) -> None:
    (examination,) = [one for one in examinations(Mutant(**changes)) if name in obligations(one)]
    found, text = verdict(examination, name)
    assert found == "failed", text
    assert text


def test_every_obligation_has_a_mutant() -> None:
    assert {name for one in examinations(TRUE) for name in obligations(one)} == {name for name, _ in MUTANTS}


def test_the_unchanged_backend_passes_the_same_way() -> None:
    for examination in examinations(Mutant()):
        for name in obligations(examination):
            assert verdict(examination, name) == ("tested", ""), name


def test_noise_of_privatize_is_examined_where_there_is_no_release() -> None:
    bench = Bench("cpu", seed=20262)
    true = NoiseExamination(TRUE, bench, QUICK, "privatize")
    assert [verdict(true, name)[0] for name in obligations(true)] == ["tested"] * len(obligations(true))
    reused = NoiseExamination(Mutant(privatize_=with_key(keyless)), bench, QUICK, "privatize")
    assert verdict(reused, "noise_depends_on_key")[0] == "failed"


def test_a_backend_that_supports_nothing_is_not_said_to_be_tested() -> None:
    picky = Mutant(supports=lambda true, op, problem, plan: ("never.",))
    for examination in examinations(picky)[1:4]:
        for name in obligations(examination):
            if "counter" not in name:
                assert verdict(examination, name)[0] == "assumed", name


def test_a_bench_repeats_itself_from_its_seed() -> None:
    first, second = Bench("cpu", 5), Bench("cpu", 5)
    assert list(first.problems(9)) == list(second.problems(9))
    assert torch.equal(first.key().words.view(torch.int32), second.key().words.view(torch.int32))
    assert NO_TENSORS.project is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_rounded_after_the_public_bound_is_taken_off_stay_within_the_sensitivity(dtype: torch.dtype) -> None:
    def rounded(logits: torch.Tensor, visible: torch.Tensor, bound: float | None) -> torch.Tensor:
        assert bound is not None
        return (torch.exp(bound * torch.tanh(logits / bound) - bound) * visible).to(dtype).float()

    backend = Mutant(release=with_weights(rounded))
    assert verdict(ReleaseExamination(backend, Bench("cpu", 5), QUICK), "token_rounding") == ("tested", "")
