"""Graphs keep every draw: equal calls differ, each run is recorded, and a spent budget stops a compiled function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention import dp_flash_attn_func, release_op
from dpfa_attention.terms import SCHEMA, Terms
from dpfa_core.errors import BudgetExhausted, LedgerError, PrivacyParameterError
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
COMPILERS = ("eager", "aot_eager", "aot_eager_decomp_partition")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def spent(ledger: Ledger) -> int:
    return sum(count for _, count in ledger.events())


def call(q: Tensor, k: Tensor, v: Tensor, ledger: Ledger | None, **options: Any) -> Tensor:
    out = dp_flash_attn_func(q, k, v, **PRIVATE, ledger=ledger, **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("compiler", COMPILERS)
def test_equal_calls_differ_in_a_compiled_training_graph(
    inputs: Callable[..., Any], ledger: Ledger, compiler: str
) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return call(q, k, v, ledger) + 0.0, call(q, k, v, ledger)

    compiled = torch.compile(twice, backend=compiler, fullgraph=True)
    q, k, v = (x.requires_grad_() for x in inputs())
    outs = []
    for run in range(2):
        one, two = compiled(q, k, v)
        (one.sum() + two.sum()).backward()
        outs += [one, two]
        assert spent(ledger) == 2 * (run + 1)
    assert len({out.detach().numpy().tobytes() for out in outs}) == 4
    expected = torch.autograd.grad(call(q, k, v, ledger).sum(), (q, k, v))
    for x, grad in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, 4 * grad)
    with torch.no_grad():
        one, two = compiled(q, k, v)
    assert (one != two).all()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_spent_budget_stops_a_compiled_function(inputs: Callable[..., Any], watched: Any, compiler: str) -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5, budget=1.0)
    compiled = torch.compile(lambda q, k, v: call(q, k, v, ledger), backend=compiler, fullgraph=True)
    compiled(*inputs())
    calls = watched.calls
    with pytest.raises(BudgetExhausted, match="Nothing was released"):
        compiled(*inputs())
    assert (calls, watched.calls, spent(ledger)) == (1, 1, 1)


def test_a_compiled_function_charges_the_ledger_it_is_given(inputs: Callable[..., Any]) -> None:
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ledgers = [Ledger.memory() for _ in range(3)]
    for ledger in (*ledgers, ledgers[0]):
        compiled(*inputs(), ledger)
    assert [spent(ledger) for ledger in ledgers] == [2, 1, 1]


def test_a_graph_whose_ledger_is_gone_releases_nothing(inputs: Callable[..., Any], watched: Any) -> None:
    number = Ledger.memory().number
    with pytest.raises(LedgerError, match=f"got number {number}, which no ledger here has; keep the ledger"):
        release_op.draw_release(release_op.DRAWN, *inputs(), 1, False, *terms(ledger=number))
    assert watched.calls == 0


def test_bad_terms_die_in_a_compiled_function_too(inputs: Callable[..., Any], ledger: Ledger) -> None:
    compiled = torch.compile(lambda q, k, v: call(q, k, v, ledger, unit="token"), backend="aot_eager")
    with pytest.raises(PrivacyParameterError, match=r'unit="token" needs queries='):
        compiled(*inputs())
    assert spent(ledger) == 0


def test_statistics_are_those_of_the_run_and_break_the_graph(inputs: Callable[..., Any], ledger: Ledger) -> None:
    compiled = torch.compile(lambda *x: dp_flash_attn_func(*x, **PRIVATE, ledger=ledger, return_privacy_stats=True))
    ids = [compiled(*inputs())[1].event_id for _ in range(2)]
    assert ids == [line.id for line in ledger.releases()]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_options_and_shapes_are_those_of_the_call(
    inputs: Callable[..., Any], ledger: Ledger, compiler: str
) -> None:
    options: dict[str, Any] = {"causal": True, "window_size": (3, 0), "logit_bound": 1.5, "clip_norm": 2.0}

    def silent(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return dp_flash_attn_func(q, k, v, epsilon=float("inf"), delta=0.0, ledger=ledger, **options)

    compiled = torch.compile(silent, backend=compiler, fullgraph=True, dynamic=True)
    for sizes in ({"S": 7}, {"S": 12, "B": 3}):
        q, k, v = inputs(**sizes, Hk=2)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        torch.testing.assert_close(compiled(*turned), silent(q, k, v))


class Twice(nn.Module):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return call(q, k, v, self.ledger) + 0.0, call(q, k, v, self.ledger)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_draws_and_records_at_each_run(
    inputs: Callable[..., Any], ledger: Ledger, strict: bool
) -> None:
    program = torch.export.export(Twice(ledger), inputs(), strict=strict)
    assert spent(ledger) == 0
    outs = []
    for module in (program.module(), program.run_decompositions().module()):
        for _ in range(2):
            outs += module(*inputs())
    assert len({out.numpy().tobytes() for out in outs}) == 8
    assert spent(ledger) == 8


def terms(**changes: Any) -> Terms:
    fixed: dict[str, Any] = {
        "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, **PRIVATE, "unit": "sequence",
        "relation": "replace", "queries": None, "clip_norm": None, "clip": "value", "logit_bound": None,
        "mechanism": "gaussian", "noise_structure": None, "head_epsilons": None, "allow_infinite_heads": False,
        "backend": "auto", "seed": None, "ledger": 0, "ledger_delta": 0.0, "lengths": (),
    }  # fmt: skip
    return Terms(**fixed | changes)


def test_terms_are_the_operators_arguments_in_order() -> None:
    assert [part.split()[1] for part in SCHEMA.split(", ")] == list(Terms._fields)
    public = inspect.signature(dp_flash_attn_func).parameters
    assert set(Terms._fields) - {"ledger_delta", "lengths", "mask"} <= set(public)


@pytest.mark.parametrize("changes", [{}, {"head_epsilons": (0.5, 0.4, 0.3, 0.2)}, {"lengths": (9, 9, 4, 5)}])
def test_operators_pass_torchs_own_checks(inputs: Callable[..., Any], changes: dict[str, Any]) -> None:
    q, k, v = inputs()
    ticket = release_op.draw_release(release_op.DRAWN, q, k, v, 1, False, *terms(**changes))
    torch.library.opcheck(release_op.release, (q, k, v, ticket, *terms(**changes)))
    torch.library.opcheck(release_op.release_backward, (torch.ones_like(q), q, k, v, *terms(**changes)))
    # the fourth check wants two equal draws, which must differ
    few = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        release_op.draw_release, (release_op.DRAWN, q, k, v, 1, False, *terms(**changes)), test_utils=few
    )
