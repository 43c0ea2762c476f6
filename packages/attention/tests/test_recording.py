"""Nothing is computed that is not in the ledger first."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpfa_attention import dp_flash_attn_func
from dpfa_attention.default_ledger import process_ledger
from dpfa_core.errors import BudgetExhausted, LedgerError, PrivacyParameterError
from dpfa_core.events import Composed, EpsilonDelta, Gaussian
from dpfa_core.ledger import Ledger

PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}


def test_the_event_is_there_when_the_backend_starts(inputs: Callable[..., Any], watched: Any, ledger: Ledger) -> None:
    seen = []
    watched.before = lambda: seen.append(len(list(ledger.releases())))
    for _ in range(2):
        dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    assert seen == [1, 2]


def test_a_backend_that_fails_leaves_the_event_charged(
    inputs: Callable[..., Any], watched: Any, ledger: Ledger
) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    watched.before = fail
    with pytest.raises(MemoryError, match="no room"):
        dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    assert ledger.spent() > 0.99


def test_a_ledger_that_fails_means_no_release(inputs: Callable[..., Any], watched: Any, ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="was closed; open it again"):
        dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    assert watched.calls == 0


def test_budget_stops_before_anything_is_computed(inputs: Callable[..., Any], watched: Any, tmp_path: Path) -> None:
    terms: dict[str, Any] = {"unit": "sequence", "relation": "replace", "delta": 1e-5}
    ledger = Ledger.open(tmp_path / "spent.db", **terms, budget=1.0)
    dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    with pytest.raises(BudgetExhausted, match=r"budget is epsilon=1.0 at delta=1e-05; .* Nothing was released"):
        dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    assert watched.calls == len(list(ledger.releases())) == 1


def test_a_release_that_is_not_private_exhausts_any_budget(inputs: Callable[..., Any], watched: Any) -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5, budget=100.0)
    with pytest.raises(BudgetExhausted):
        dp_flash_attn_func(*inputs(), epsilon=math.inf, delta=0.0, clip_norm=1.0, ledger=ledger)
    assert watched.calls == 0


def test_the_line_names_mechanism_backend_versions_and_what_was_declared(
    inputs: Callable[..., Any], releasing: str
) -> None:
    ledger = Ledger.memory(unit="token", relation="replace")
    token: dict[str, Any] = {"unit": "token", "logit_bound": 1.0, "ledger": ledger} | PRIVATE
    dp_flash_attn_func(*inputs(), queries="private", mechanism="pld", **token)
    dp_flash_attn_func(*inputs(), queries="public", seed=9, **token)
    dp_flash_attn_func(*inputs(), queries="public", **token | {"epsilon": math.inf})
    one, two, three = ledger.releases()
    assert [line.purpose for line in (one, two, three)] == [
        "release",
        "release; queries declared public; noise from a seed, not secure",
        "release; queries declared public",
    ]
    assert [line.mechanism for line in (one, two, three)] == ["gaussian", "gaussian", "none"]
    assert {line.backend for line in (one, two, three)} == {releasing}
    assert {"dpfa-core", "dpfa-mechanisms", f"dpfa-kernels-{releasing}"} <= dict(one.versions).keys()


def test_the_event_is_the_noise_and_the_end_of_its_sampler(inputs: Callable[..., Any], ledger: Ledger) -> None:
    _, stats = dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger, return_privacy_stats=True)
    ((event, count),) = ledger.events()
    assert isinstance(event, Composed)
    noise, end = event.events
    assert (noise, count) == (Gaussian(stats.noise_multiplier), 1)
    assert isinstance(end, EpsilonDelta)
    assert end.epsilon == 0
    assert 0 < end.delta < 1e-8


def test_what_one_call_spends_is_what_was_asked(inputs: Callable[..., Any], ledger: Ledger) -> None:
    dp_flash_attn_func(*inputs(), **PRIVATE, ledger=ledger)
    # priced by another accountant than the one that calibrated, which rounds up on a grid
    assert ledger.spent() == pytest.approx(1.0, rel=1e-4)


def test_process_ledgers_are_one_for_each_kind_of_promise() -> None:
    assert process_ledger("sequence") is process_ledger("sequence", "replace")
    assert process_ledger("sequence") is not process_ledger("sequence", "add_or_remove")
    assert process_ledger("token").unit == "token"
    with pytest.raises(PrivacyParameterError, match="unit must be one of"):
        process_ledger("word")  # type: ignore[arg-type]
