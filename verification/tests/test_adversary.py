"""The adversary climbs to every bound that is attained, passes none, and passes that of each broken twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_core.spec import AttentionProblem
from dpfa_kernels_torch.backend import TorchBackend
from dpfa_mechanisms.sensitivity import sensitivity
from dpfa_verification.audit.adversary import Attack, ascend, noiseless
from dpfa_verification.audit.call import noiseless_call
from dpfa_verification.audit.cases import Case, problem_of, sequence_cases, spec_of, token_cases

REACHED = 0.999

pytest.importorskip(
    "dpfa_attention", reason="dpfa-attention is not installed: the call is attacked", exc_type=ModuleNotFoundError
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mechanism_of(norm: str) -> str:
    return "laplace" if norm == "l1" else "gaussian"


@pytest.mark.parametrize("case", [*token_cases(), *sequence_cases()], ids=lambda case: case.title)
def test_the_adversary_reaches_the_claim_of_the_call_and_never_passes_it(case: Case) -> None:
    attack = ascend(noiseless_call(case.spec, mechanism=mechanism_of(case.norm)), case.spec, case.problem, case.norm)
    ratio = attack.distance / case.claim
    print(f"{case.title}: {ratio:.5f} of the claim")
    assert ratio <= 1.0
    assert ratio >= (REACHED if case.attained else 0.65)


@pytest.mark.parametrize("queries", ["public", "private"])
@pytest.mark.parametrize(
    "fields",
    [
        {"batch": 2, "lengths": ((8, 8), (3, 5)), "causal": True},
        {"q_len": 8, "kv_len": 5, "causal": True},  # the first queries have no key
        {"mask": bytes([0b10110111, 0b11011011, 0b01111111, 0b11101111, 0b10111101, 0b11111111, 0b10000001, 0xFF])},
    ],
    ids=["lengths", "queries without a key", "packed mask"],
)
def test_what_only_a_backend_is_given_is_attacked_there(queries: str, fields: dict[str, Any]) -> None:
    spec, problem = spec_of("token", queries), problem_of(**fields)
    ratio = ascend(noiseless(TorchBackend()), spec, problem).distance / sensitivity(spec, problem).value
    print(f"{ratio:.5f} of the claim")
    assert ratio <= 1.0
    assert ratio >= (REACHED if queries == "public" else 0.95)


def test_the_pair_that_is_returned_is_a_pair_of_neighbours_that_far_apart() -> None:
    spec, problem = spec_of("token", "private"), problem_of(causal=True)
    release = noiseless(TorchBackend())
    attack = ascend(release, spec, problem, steps=40)
    row, key = attack.record
    for x, y, place in zip(attack.one, attack.two, (row, key, key), strict=True):
        same = (x == y).flatten(2).all(-1)[0]
        assert [place for place, kept in enumerate(same.tolist()) if not kept] == [place]
    outs = [release(*inputs, attack.problem) for inputs in (attack.one, attack.two)]
    assert torch.linalg.vector_norm(outs[0] - outs[1]).item() == pytest.approx(attack.distance, rel=1e-12)


LONG = problem_of(q_len=32, kv_len=32, q_heads=1, kv_heads=1, logit_bound=0.5)
OUTPUT = replace(LONG, clip="output")


def attack_of(release: Any, queries: str, problem: AttentionProblem) -> Attack:
    return ascend(release, spec_of("token", queries), problem, restarts=1)


@pytest.mark.parametrize("queries", ["public", "private"])
def test_an_output_clip_breaks_the_token_bound_and_reaches_the_wide_one(queries: str) -> None:
    """The bound of tokens needs the value clip: with the output clip alone each row that sees a token moves by 2C."""
    bound = sensitivity(spec_of("token", queries), LONG)
    found = attack_of(noiseless(TorchBackend()), queries, OUTPUT).distance
    print(
        f"{queries} queries: {found / bound.value:.2f} times the bound of tokens, {found / bound.naive:.5f} of the wide"
    )
    assert found > (12 if queries == "public" else 8) * bound.value
    assert REACHED * bound.naive <= found <= bound.naive


Twin = Callable[[Tensor, Tensor, Tensor, AttentionProblem], Tensor]


def without_a_logit_bound(true: Twin) -> Twin:
    return lambda q, k, v, problem: true(q, k, v, replace(problem, logit_bound=None))


def clip_a_little_long(true: Twin) -> Twin:
    return lambda q, k, v, problem: true(q, k, v, replace(problem, clip_norm=1.01 * (problem.clip_norm or 1.0)))


def next_token_mixed_in(true: Twin) -> Twin:
    """A convolution over tokens before the call: row j of k and v holds two records."""

    def release(q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem) -> Tensor:
        return true(q, k + k.roll(1, 1), v + v.roll(1, 1), problem)

    return release


def residual_around_the_call(true: Twin) -> Twin:
    return lambda q, k, v, problem: true(q, k, v, problem) + v


@pytest.mark.parametrize(
    "twin", [without_a_logit_bound, clip_a_little_long, next_token_mixed_in, residual_around_the_call]
)
def test_a_broken_release_is_caught(twin: Any) -> None:
    spec, problem = spec_of("token", "public"), problem_of()
    found = ascend(twin(noiseless(TorchBackend())), spec, problem, steps=60).distance
    print(f"{found / sensitivity(spec, problem).value:.3f} times the claim")
    assert found > 1.005 * sensitivity(spec, problem).value


def test_private_queries_priced_as_public_are_caught() -> None:
    found = ascend(noiseless(TorchBackend()), spec_of("token", "private"), problem_of()).distance
    claim = sensitivity(spec_of("token", "public"), problem_of()).value
    print(f"{found / claim:.3f} times the claim")
    assert found > 1.05 * claim


@pytest.mark.parametrize("relation", ["replace", "add_or_remove"])
def test_half_a_sensitivity_and_one_without_its_root_are_caught(relation: Any) -> None:
    spec, problem = spec_of("sequence", None, relation), problem_of()
    found = ascend(noiseless(TorchBackend()), spec, problem).distance
    right = sensitivity(spec, problem).value
    assert found > 1.9 * (right / 2)
    assert found > right / math.sqrt(problem.q_heads)
