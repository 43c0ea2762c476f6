from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpfa_attention import noise_keys
from dpfa_attention.private_memory import PrivateMemory
from dpfa_core.errors import BudgetExhausted, LedgerError, PrivacyParameterError
from dpfa_core.ledger import Ledger

DIM, WIDE, SEED = 4, 6, 771


def records(n: int = 30, heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, heads, DIM, generator=generator), torch.randn(n, heads, WIDE, generator=generator)


def memory(
    path: Path | None = None, *, budget: float = 1e6, relation: Any = "replace", **options: Any
) -> PrivateMemory:
    terms: dict[str, Any] = {"unit": "token", "relation": relation, "delta": 1e-4, "budget": budget}
    ledger = Ledger.memory(**terms) if path is None else Ledger.open(path, **terms)
    given = {"key_dim": DIM, "value_dim": WIDE, "key_heads": 2, "epsilon": 1.0, "delta": 1e-6, "logit_bound": 1.0}
    return PrivateMemory(**given | options, ledger=ledger)


def ordinary(made: PrivateMemory, queries: Tensor, keys: Tensor, values: Tensor, empty: int = 0) -> Tensor:
    """The attention that is noised, written out."""
    keys, values = (torch.cat((rows, torch.zeros(empty, *rows.shape[1:]))).double() for rows in (keys, values))
    values = values * (made.clip_norm / values.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,nhd->hqn", queries.double(), keys) * made.softmax_scale
    logits = made.logit_bound * (logits / made.logit_bound).tanh()
    return torch.einsum("hqn,nhd->qhd", logits.softmax(-1), values).float()


@pytest.mark.parametrize("capacity", [None, 40])
def test_an_answer_is_bounded_attention_over_all_records_and_noise_of_the_stated_size(capacity: int | None) -> None:
    relation = "replace" if capacity is None else "add_or_remove"
    made = memory(relation=relation, capacity=capacity, epsilon=40.0)
    keys, values = records()
    for first, last in ((0, 11), (11, 30)):
        made.append(keys[first:last], values[first:last])
    assert len(made) == 30
    queries = torch.randn(200, 4, DIM, generator=torch.Generator().manual_seed(1))
    out, stats = made.answer(queries, return_privacy_stats=True)
    assert isinstance(out, Tensor)
    assert out.shape == (200, 4, WIDE)
    noise = out - ordinary(made, queries, keys, values, 0 if capacity is None else capacity - 30)
    # chi square of 4800 normals: five standard deviations
    assert noise.square().mean().item() / stats.noise_std**2 == pytest.approx(1.0, abs=5 * math.sqrt(2 / 4800))
    assert stats.epsilon_spent <= 40.0
    assert (stats.unit, stats.relation) == ("token", relation)
    assert next(iter(made.ledger.releases())).purpose == "release; queries declared public"


def test_the_noise_of_a_call_grows_with_the_root_of_its_queries_and_does_not_know_how_many_places_are_taken() -> None:
    made = memory(relation="add_or_remove", capacity=40)
    empty = made.answer(torch.zeros(1, 2, DIM), return_privacy_stats=True)[1]
    made.append(*records())
    one, nine = (made.answer(torch.zeros(n, 2, DIM), return_privacy_stats=True)[1] for n in (1, 9))
    assert empty.noise_std == one.noise_std
    assert nine.noise_std / one.noise_std == pytest.approx(3.0, rel=1e-3)
    assert "30" not in repr(made)
    with pytest.raises(PrivacyParameterError, match="capacity=40 has room for 10 more records, got 11"):
        made.append(*records(11))


def test_a_hostile_query_moves_an_answer_by_no_more_than_the_bound() -> None:
    """Neighbouring memories with the same noise: what is left of the difference is the record's influence."""
    hostile = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e20, 1e-45, 1.0])
    queries = torch.cartesian_prod(hostile, hostile)[:, None, :].repeat(1, 2, 2)
    answers = []
    for replaced in (False, True):
        noise_keys._sources.pop(SEED, None)  # the seed starts again, so that both get the same noise
        made = memory(seed=SEED)
        keys, values = records()
        if replaced:
            keys[3], values[3] = -1e30, 1e30
        made.append(keys, values)
        answers.append(made.answer(queries, return_privacy_stats=True))
    noise_keys._sources.pop(SEED, None)
    (one, stats), (other, _) = answers
    assert bool(torch.isfinite(one).all() and torch.isfinite(other).all())
    assert 0 < (one - other).norm() <= stats.noise_std / stats.noise_multiplier


def test_a_record_that_is_not_finite_counts_as_zeros_in_silence() -> None:
    keys, values = records()
    answers = []
    for bad in (math.nan, math.inf, 0.0):
        noise_keys._sources.pop(SEED, None)  # the seed starts again, so that all get the same noise
        made = memory(seed=SEED)
        broken_keys, broken_values = keys.clone(), values.clone()
        broken_keys[2, 0], broken_values[2, 0] = bad, bad
        made.append(broken_keys, broken_values)
        answers.append(made.answer(torch.ones(3, 2, DIM)))
    noise_keys._sources.pop(SEED, None)
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[2])


def test_a_call_beyond_the_budget_is_refused_before_it_is_computed(watched: Any) -> None:
    made = memory(budget=3.0)
    made.append(*records())
    calls = 0
    while calls < 100:
        try:
            made.answer(torch.zeros(2, 2, DIM))
        except BudgetExhausted:
            break
        calls += 1
    assert 3 <= calls == watched.calls == len(list(made.ledger.releases()))
    assert made.ledger.spent() <= 3.0
    # a budget is for the records' whole life: records that come later do not bring more of it
    made.append(*records())
    with pytest.raises(BudgetExhausted):
        made.answer(torch.zeros(2, 2, DIM))


def test_an_answer_carries_no_gradient_to_the_query() -> None:
    made = memory()
    made.append(*records())
    query = torch.zeros(1, 2, DIM, requires_grad=True)
    assert not made.answer(query).requires_grad


def test_one_head_needs_no_axis_of_heads() -> None:
    made = memory(key_heads=1)
    made.append(torch.randn(5, DIM), torch.randn(5, WIDE))
    assert made.answer(torch.randn(3, DIM)).shape == (3, WIDE)
    assert made.answer(torch.randn(3, 2, DIM)).shape == (3, 2, WIDE)


REFUSED = {
    "epsilon": ({"epsilon": math.inf}, "epsilon must be a finite number > 0"),
    "delta": ({"delta": 0.0}, "delta must be in"),
    "bound": ({"logit_bound": math.inf}, "logit_bound must be a finite number"),
    "dtype": ({"dtype": torch.float64}, "dtype must be"),
    "capacity": ({"capacity": 9}, "capacity must be None"),
    "no capacity": ({"relation": "add_or_remove"}, "needs capacity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_promise_that_cannot_be_kept_is_refused(name: str) -> None:
    options, text = REFUSED[name]
    with pytest.raises(PrivacyParameterError, match=text):
        memory(**options)


@pytest.mark.parametrize(
    "terms", [{"unit": "sequence", "budget": 1.0}, {"unit": "token"}, {"budget": 1.0}], ids=["unit", "budget", "none"]
)
def test_a_ledger_for_something_else_is_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="unit='token', a relation, a delta and a budget"):
        PrivateMemory(
            key_dim=2,
            value_dim=2,
            epsilon=1.0,
            delta=1e-6,
            logit_bound=1.0,
            ledger=Ledger.memory(relation="replace", delta=1e-5, **terms),
        )


def test_shapes_are_refused_by_name() -> None:
    made = memory()
    with pytest.raises(PrivacyParameterError, match="must hold a record"):
        made.answer(torch.zeros(1, 2, DIM))
    with pytest.raises(PrivacyParameterError, match=r"keys must be \[records, 2, 4\]"):
        made.append(torch.zeros(3, 2, WIDE), torch.zeros(3, 2, WIDE))
    with pytest.raises(PrivacyParameterError, match="values must hold 3 records"):
        made.append(torch.zeros(3, 2, DIM), torch.zeros(4, 2, WIDE))
    made.append(*records())
    for wrong in (
        torch.zeros(1, 3, DIM),
        torch.zeros(0, 2, DIM),
        torch.zeros(1, 2, WIDE),
        torch.zeros(1, 2, DIM).int(),
    ):
        with pytest.raises(PrivacyParameterError, match=r"queries must be \[n, a multiple of 2, 4\]"):
            made.answer(wrong)
    assert not list(made.ledger.releases())


# ---- files


def saved(folder: Path) -> PrivateMemory:
    made = memory(folder / "ledger")
    made.append(*records())
    made.answer(torch.zeros(1, 2, DIM))
    made.save(folder / "memory")
    return made


def copies(path: Path, to: Path) -> None:
    """A backup of a ledger that is closed."""
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, to / file.name)


def test_a_loaded_memory_answers_as_before_and_goes_on_with_its_budget(tmp_path: Path) -> None:
    made = saved(tmp_path)
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o600
    spent = made.ledger.spent()
    made.ledger.close()
    again = PrivateMemory.load(tmp_path / "memory", Ledger.read(tmp_path / "ledger"))
    assert torch.equal(again._keys, made._keys)
    assert torch.equal(again._values, made._values)
    assert again._terms() == made._terms()
    assert again.ledger.spent() == spent > 0
    again.answer(torch.zeros(1, 2, DIM))
    assert again.ledger.spent() > spent
    again.append(*records(2))
    again.save(tmp_path / "memory")
    assert len(PrivateMemory.load(tmp_path / "memory", again.ledger)) == 32


@pytest.mark.parametrize("answered", ["before saving", "after saving", "after loading"])
def test_an_older_copy_of_the_ledger_is_refused(tmp_path: Path, answered: str) -> None:
    (tmp_path / "old").mkdir()
    made = memory(tmp_path / "ledger")
    made.append(*records())
    if answered != "before saving":
        made.save(tmp_path / "memory")
    made.ledger.close()
    copies(tmp_path / "ledger", tmp_path / "old")
    ledger = Ledger.read(tmp_path / "ledger")
    if answered == "after loading":
        made = PrivateMemory.load(tmp_path / "memory", ledger)
    made.ledger = ledger
    made.answer(torch.zeros(1, 2, DIM))
    if answered == "before saving":
        made.save(tmp_path / "memory")
    ledger.close()
    old = Ledger.read(tmp_path / "old" / "ledger")
    with pytest.raises(LedgerError, match="older copy or another ledger"):
        PrivateMemory.load(tmp_path / "memory", old)
    made.ledger = old
    with pytest.raises(LedgerError, match="older copy or another ledger"):
        made.save(tmp_path / "memory")
    assert len(PrivateMemory.load(tmp_path / "memory", Ledger.read(tmp_path / "ledger"))) == 30


def test_another_ledger_lost_receipts_and_another_budget_are_refused(tmp_path: Path) -> None:
    made = saved(tmp_path)
    terms: dict[str, Any] = {"unit": "token", "relation": "replace", "delta": 1e-4}
    with pytest.raises(LedgerError, match="older copy or another ledger"):
        PrivateMemory.load(tmp_path / "memory", Ledger.open(tmp_path / "fresh", **terms, budget=1e6))
    with pytest.raises(LedgerError, match=r"budget=1000000.0, got one with 99.0"):
        PrivateMemory.load(tmp_path / "memory", Ledger.open(tmp_path / "large", **terms, budget=99.0))
    (tmp_path / "memory.receipts").unlink()
    with pytest.raises(LedgerError, match="no such file"):
        PrivateMemory.load(tmp_path / "memory", made.ledger)
    with pytest.raises(PrivacyParameterError, match=r"file that PrivateMemory.save wrote"):
        PrivateMemory.load(tmp_path / "ledger", made.ledger)


def test_a_memory_with_a_ledger_that_ends_with_the_process_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PrivacyParameterError, match="needs a ledger that lasts"):
        memory().save(tmp_path / "memory")
    assert not list(tmp_path.iterdir())


def test_without_safetensors_the_error_says_what_to_install_and_no_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = memory(tmp_path / "ledger")
    made.append(*records())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    before = sorted(tmp_path.iterdir())
    for act in (made.save, lambda path: PrivateMemory.load(path, made.ledger)):
        with pytest.raises(PrivacyParameterError, match=r"pip install 'dpfa-attention\[files\]'"):
            act(tmp_path / "memory")
    assert sorted(tmp_path.iterdir()) == before
    made.answer(torch.randn(1, 2, DIM))  # as before: nothing waits for a receipt


def test_a_receipt_that_a_crash_cut_short_is_no_line_and_a_failing_one_keeps_the_answer_inside(tmp_path: Path) -> None:
    made = saved(tmp_path)
    receipts = tmp_path / "memory.receipts"
    with receipts.open("a") as file:
        file.write("\n0123abc")
    again = PrivateMemory.load(tmp_path / "memory", made.ledger)
    again.answer(torch.zeros(1, 2, DIM))
    assert len(PrivateMemory.load(tmp_path / "memory", made.ledger)) == 30
    receipts.unlink()
    receipts.mkdir()
    with pytest.raises(OSError, match="receipts"):
        again.answer(torch.zeros(1, 2, DIM))
    assert len(list(made.ledger.releases())) == 3  # charged, and not answered


def test_two_holders_of_one_memory_share_its_budget_and_its_receipts(tmp_path: Path) -> None:
    saved(tmp_path).ledger.close()
    holders = [PrivateMemory.load(tmp_path / "memory", Ledger.read(tmp_path / "ledger")) for _ in range(2)]
    for _ in range(3):
        for holder in holders:
            holder.answer(torch.zeros(1, 2, DIM))
    assert len(list(holders[0].ledger.releases())) == 7
    assert holders[0].ledger.spent() == holders[1].ledger.spent()
    held = {line.id for line in holders[0].ledger.releases()}
    assert {line for line in (tmp_path / "memory.receipts").read_text().split("\n") if line} == held
