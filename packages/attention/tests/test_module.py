from __future__ import annotations

import copy
import json
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention.module import DPFlashAttention
from dpfa_attention.release_paths import check_release_paths
from dpfa_attention.training_engine import ENGINE
from dpfa_core.errors import BudgetExhausted, LedgerError, NotPrivateError, PrivacyParameterError
from dpfa_core.events import NonPrivate
from dpfa_core.ledger import Ledger

E, H = 16, 4
EXACT: dict[str, Any] = {"epsilon": math.inf, "delta": 0.0}
PRIVATE: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, DPFlashAttention]:
    """torch's module and ours with its weights."""
    torch.manual_seed(0)
    shape = {name: options[name] for name in ("bias", "kdim", "vdim") if name in options}
    theirs = nn.MultiheadAttention(E, H, batch_first=options.pop("batch_first", True), **shape)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = DPFlashAttention(E, H, batch_first=theirs.batch_first, **{**EXACT, "ledger": Ledger.memory(), **options})
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("setting", ["release", "training"])
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, [(2, 6, E)]),
        ({"batch_first": False}, [(6, 2, E)]),
        ({"batch_first": False, "bias": False}, [(6, 2, E), (4, 2, E), (4, 2, E)]),
        ({"kdim": 10, "vdim": 7}, [(2, 6, E), (2, 4, 10), (2, 4, 7)]),
        ({}, [(6, E)]),
    ],
)
def test_with_the_weights_of_torchs_module_it_is_that_module(
    options: dict[str, Any], shapes: list[tuple[int, ...]], setting: str
) -> None:
    theirs, ours = pair(**options, setting=setting)
    inputs = [words(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected = theirs(*(inputs if len(inputs) == 3 else inputs * 3))[0]
    out, stats = ours.eval()(*inputs, return_privacy_stats=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert stats.scope == ("release" if setting == "release" else "pending_step")


def masks(name: str, S: int = 6) -> tuple[dict[str, Any], Tensor]:
    """(arguments, the rows that are not padding)."""
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    padding = torch.arange(S) >= torch.tensor([S, 4])[:, None]
    additive = torch.zeros(2, S).masked_fill(padding, -math.inf)
    return {
        "causal": ({"attn_mask": ahead}, ~padding | True),
        "causal, additive": ({"attn_mask": torch.zeros(S, S).masked_fill(ahead, -1e9)}, ~padding | True),
        "causal, each head": ({"attn_mask": ahead.expand(2 * H, S, S)}, ~padding | True),
        "padding": ({"key_padding_mask": padding}, ~padding | True),
        "padding, additive": ({"key_padding_mask": additive}, ~padding | True),
        "both": ({"attn_mask": ahead, "key_padding_mask": padding}, ~padding),
    }[name]


NAMES = ["causal", "causal, additive", "causal, each head", "padding", "padding, additive", "both"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_hides_what_it_hides_in_torchs_module(name: str) -> None:
    theirs, ours = pair()
    x = words(2, 6, E)
    arguments, rows = masks(name)
    expected = theirs(x, x, x, **arguments)[0]
    torch.testing.assert_close(ours(x, **arguments)[rows], expected[rows], atol=1e-5, rtol=1e-5)
    trained = pair(setting="training")[1].eval()(x, **arguments)
    torch.testing.assert_close(trained[rows], expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (2, 0)}, {"window_size": (1, 1)}])
def test_padding_is_not_attended_under_causal_and_window(options: dict[str, Any]) -> None:
    _, ours = pair(**options)
    short, long = words(1, 4, E), words(1, 6, E)
    long[:, :4] = short
    padding = torch.tensor([[False] * 4 + [True] * 2])
    torch.testing.assert_close(ours(long, key_padding_mask=padding)[:, :4], ours(short))
    trained = pair(setting="training", **options)[1].eval()
    torch.testing.assert_close(trained(short), ours(short), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["left", "anywhere"])
@pytest.mark.parametrize("diagonal", [None, "causal", "mask"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_may_be_anywhere_in_a_row(where: str, diagonal: str | None, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, causal=diagonal == "causal")
    ahead = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.arange(6) < torch.tensor([[0], [1], [3]])
    if where == "anywhere":
        padding = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    x, rows = words(3, 6, E), ~padding
    expected = theirs(*[x if batch_first else x.transpose(0, 1)] * 3, padding, attn_mask=ahead if diagonal else None)[0]
    mask = {"attn_mask": ahead} if diagonal == "mask" else {}

    def run(x: Tensor) -> Tensor:
        out: Tensor = ours(x if batch_first else x.transpose(0, 1), key_padding_mask=padding, **mask)
        return out if batch_first else out.transpose(0, 1)

    found = run(x)
    torch.testing.assert_close(
        found[rows], (expected if batch_first else expected.transpose(0, 1))[rows], atol=1e-5, rtol=1e-5
    )
    other = x.clone()
    other[padding] = words(int(padding.sum()), E)
    assert torch.equal(run(other)[rows], found[rows])


def test_padding_in_front_costs_what_padding_behind_does() -> None:
    padding = torch.arange(6) < torch.tensor([[1], [3]])
    x = words(2, 6, E)
    spent = []
    for hidden in (padding, padding.flip(1)):
        ours = DPFlashAttention(E, H, **PRIVATE, causal=True, ledger=Ledger.memory())
        _, stats = ours(x, key_padding_mask=hidden, return_privacy_stats=True)
        spent.append((stats.epsilon_spent, stats.noise_std))
    assert spent[0] == spent[1]


def test_padding_under_a_window_may_be_at_either_end_and_not_inside() -> None:
    _, ours = pair(window_size=(2, 0))
    short, long = words(1, 4, E), words(1, 6, E)
    long[:, 2:] = short
    padding = torch.tensor([[True] * 2 + [False] * 4])
    torch.testing.assert_close(ours(long, key_padding_mask=padding)[:, 2:], ours(short))
    with pytest.raises(PrivacyParameterError, match="must be at the ends"):
        ours(long, key_padding_mask=torch.tensor([[False, True, False, False, True, False]]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"attn_mask": torch.stack([torch.eye(6).bool()] * 4 + [torch.zeros(6, 6).bool()] * 4)}, "must show the same"),
        ({"attn_mask": torch.full((6, 6), math.nan)}, "NaN or"),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.long)}, "attn_mask must be a bool or floating-point tensor"),
        ({"key_padding_mask": torch.zeros(2, 5).bool()}, "key_padding_mask must be"),
        ({"attn_mask": torch.zeros(5, 6).bool()}, "attn_mask must be"),
        ({"key": words(2, 6, E)}, "given together"),
    ],
)
def test_masks_that_cannot_be_served_are_refused_before_the_ledger(arguments: dict[str, Any], text: str) -> None:
    ledger = Ledger.memory()
    ours = DPFlashAttention(E, H, **PRIVATE, ledger=ledger)
    with pytest.raises(PrivacyParameterError, match=text):
        ours(words(2, 6, E), **arguments)
    assert not list(ledger.releases())


def test_torchs_encoder_cannot_go_round_the_noise() -> None:
    ledger = Ledger.memory()
    layer = nn.TransformerEncoderLayer(E, H, 8, batch_first=True, dropout=0.0)
    layer.self_attn = DPFlashAttention(E, H, **PRIVATE, ledger=ledger)  # type: ignore[assignment]
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
        out = encoder(words(2, 4, E), src_key_padding_mask=padding)
    assert out.shape == (2, 4, E)
    assert len(list(ledger.releases())) == 2
    reports = [each.self_attn.get_privacy_spent() for each in encoder.layers]  # type: ignore[union-attr,operator]
    assert [report["forward_count"] for report in reports] == [1, 1]
    assert float(reports[0]) <= 1.0 < reports[0]["ledger_epsilon"]


def test_weights_are_never_returned() -> None:
    _, ours = pair()
    with pytest.raises(NotPrivateError, match="need_weights must be False"):
        ours(words(2, 6, E), need_weights=True)
    out, weights = ours(words(2, 6, E), need_weights=False)
    assert weights is None
    assert isinstance(ours(words(2, 6, E)), Tensor)
    assert out.shape == (2, 6, E)


def test_a_backward_into_private_inputs_raises_unless_it_is_blocked_or_allowed() -> None:
    def run(choice: Any) -> tuple[DPFlashAttention, Tensor, Tensor]:
        module = DPFlashAttention(E, H, **PRIVATE, ledger=Ledger.memory(), upstream_gradients=choice)
        x = words(2, 6, E).requires_grad_()
        return module, x, module(x).square().sum()

    module, _, loss = run(None)
    torch.autograd.grad(loss, module.out_proj.weight, retain_graph=True)
    with pytest.raises(NotPrivateError, match=r'stop at the release.*upstream_gradients="block"'):
        loss.backward()
    module, x, loss = run("block")
    loss.backward()
    assert x.grad is None
    assert module.in_proj_weight.grad is None  # type: ignore[union-attr]
    assert module.out_proj.weight.grad.any()  # type: ignore[union-attr]
    module, x, loss = run("allow")
    loss.backward()
    assert x.grad.any()  # type: ignore[union-attr]
    assert module.in_proj_weight.grad.any()  # type: ignore[union-attr]
    with torch.no_grad():
        assert not run(None)[2].requires_grad


def test_spending_adds_up_and_a_reset_keeps_the_lifetime() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5)
    module = DPFlashAttention(E, H, **PRIVATE, ledger=ledger)
    assert float(module.get_privacy_spent()) == 0.0
    stats = [module(words(2, 6, E), return_privacy_stats=True)[1] for _ in range(3)]
    spent = module.get_privacy_spent()
    assert 1.0 < float(spent) < 3.0
    assert float(spent) == spent["total_epsilon"] == ledger.spent()
    assert (spent["total_delta"], spent["forward_count"], spent.event_id) == (1e-5, 3, stats[-1].event_id)
    assert (spent["privacy_mechanism"], spent["composition_method"]) == ("gaussian", "gdp")
    assert json.loads(json.dumps(spent)) == spent
    with pytest.raises(PrivacyParameterError, match="reason must say why"):
        module.reset_privacy_accounting()
    module.reset_privacy_accounting(reason="other records")
    module(words(2, 6, E))
    after = module.get_privacy_spent()
    assert after["forward_count"] == 1
    assert float(after) <= 1.0
    assert after["lifetime_epsilon"] == after["ledger_epsilon"] == ledger.spent() > float(spent)
    assert module.period_reasons == ("other records",)


def test_an_alias_is_priced_by_its_accountant_and_no_noise_is_infinite() -> None:
    module = DPFlashAttention(E, H, **PRIVATE, noise_mechanism="standard", ledger=Ledger.memory())
    module(words(2, 6, E))
    spent = module.get_privacy_spent()
    assert (spent["privacy_mechanism"], spent["composition_method"]) == ("gaussian", "rdp")
    _, exact = pair()
    exact(words(2, 6, E))
    assert float(exact.get_privacy_spent()) == math.inf
    assert list(exact._calls.ledger.events()) == [(NonPrivate(), 1)]


def test_a_copy_is_charged_to_the_same_ledger_and_a_pickle_never_loses_one() -> None:
    ledger = Ledger.memory(delta=1e-5, budget=2.0)
    module = DPFlashAttention(E, H, **PRIVATE, ledger=ledger)
    module(words(2, 6, E))
    other = copy.deepcopy(module)
    other(words(2, 6, E))
    assert other.get_privacy_spent()["forward_count"] == 1
    assert len(list(ledger.releases())) == 2
    third = copy.deepcopy(other)
    third(words(2, 6, E))
    with pytest.raises(BudgetExhausted):
        third(words(2, 6, E))
    with pytest.raises(LedgerError, match="cannot be pickled"):
        pickle.dumps(module)
    pickle.loads(pickle.dumps(DPFlashAttention(E, H, **PRIVATE)))  # noqa: S301


def test_the_private_norm_is_told_only_to_who_asks_and_a_check_of_paths_names_it() -> None:
    module = DPFlashAttention(E, H, **PRIVATE, private_diagnostics=True, ledger=Ledger.memory())
    x = words(2, 6, E)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    found = module(x, return_privacy_stats=True)[1].grad_norm
    values = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :]).unflatten(-1, (H, -1)).norm(dim=-1)  # type: ignore[index]
    assert found == pytest.approx(float(values.detach().max()), rel=1e-5)
    found = module(x, key_padding_mask=padding, return_privacy_stats=True)[1].grad_norm
    assert found == pytest.approx(float(values.detach()[~padding].max()), rel=1e-5)
    assert any(path.kind == "python value" for path in check_release_paths(module, x).leaks)
    module.private_diagnostics = False
    assert math.isnan(module(x, return_privacy_stats=True)[1].grad_norm)


def test_clip_of_the_next_call_scales_its_noise_and_not_its_price() -> None:
    module = DPFlashAttention(E, H, **PRIVATE, max_grad_norm=1.0, ledger=Ledger.memory())
    one = module(words(2, 6, E), return_privacy_stats=True)[1]
    module.set_clip_norm(2.0)
    two = module(words(2, 6, E), return_privacy_stats=True)[1]
    assert two.noise_std == pytest.approx(2 * one.noise_std, rel=1e-5)
    assert two.noise_multiplier == one.noise_multiplier


def test_the_setting_is_not_train_or_eval(inputs: Callable[..., Any]) -> None:
    x, ledger = words(2, 6, E), Ledger.memory()
    release = DPFlashAttention(E, H, **PRIVATE, ledger=ledger)
    for mode in (True, False):
        assert not torch.equal(release.train(mode)(x), release(x))
    assert len(list(ledger.releases())) == 4


def test_training_refuses_to_run_outside_an_engine() -> None:
    class Engine:
        ledger = Ledger.memory(unit="example", relation="add_or_remove", delta=1e-5)

    _, module = pair(setting="training")
    x, engine = words(2, 6, E), Engine()
    with pytest.raises(NotPrivateError, match="inside an engine"):
        module.train()(x)
    with pytest.raises(NotPrivateError, match="got none"):
        module.get_privacy_spent()
    module.requires_grad_(False)(x)
    module.requires_grad_(True)
    for parameter in module.parameters():
        setattr(parameter, ENGINE, weakref.ref(engine))
    out, stats = module(x, return_privacy_stats=True)
    out.sum().backward()
    assert (stats.scope, stats.epsilon_spent, stats.unit) == ("pending_step", 0.0, "example")
    assert float(module.get_privacy_spent()) == 0.0
    del module.out_proj.weight._dpfa_engine  # type: ignore[attr-defined]
    with pytest.raises(NotPrivateError, match="inside an engine"):
        module(x)


def test_budgets_of_heads_are_the_functions_own() -> None:
    x = words(2, 6, E)
    module = DPFlashAttention(E, H, math.inf, 1e-5, head_epsilons=[0.5] * H, ledger=Ledger.memory())
    _, stats = module(x, return_privacy_stats=True)
    assert 0.5 < stats.epsilon_spent < 2.0
    assert float(module.get_privacy_spent()) == pytest.approx(stats.epsilon_spent, rel=1e-6)
    for epsilon in (1.0, None):
        with pytest.raises(PrivacyParameterError, match="allow_infinite_heads=True"):
            DPFlashAttention(E, H, epsilon, 1e-5, head_epsilons=[math.inf, 1, 1, 1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 3}, "multiple of num_heads=3"),
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"delta": 1.5}, "delta must be"),
        ({"unit": "token"}, "needs a logit_bound"),
        ({"unit": "token", "logit_bound": 1.0, "clip": "output"}, 'needs clip="value"'),
        ({"unit": "example"}, "unit must be one of"),
        ({"max_grad_norm": 1.0, "clip_norm": 2.0}, "clip_norm must equal max_grad_norm"),
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"strategy": "importance_based"}, "needs head_importances or head_epsilons"),
        ({"head_epsilons": [1.0]}, "must hold 4 numbers"),
        ({"setting": "training", "max_grad_norm": 1.0}, "make_private takes max_grad_norm"),
        ({"setting": "eval"}, "setting must be one of"),
        ({"upstream_gradients": "stop"}, "upstream_gradients must be one of"),
    ],
)
def test_what_no_call_could_use_is_refused_when_it_is_built(options: dict[str, Any], text: str) -> None:
    arguments = {"num_heads": H, **PRIVATE, **options}
    with pytest.raises(PrivacyParameterError, match=text):
        DPFlashAttention(E, **arguments)


def test_defaults_are_epsilon_one_and_the_total_of_a_list() -> None:
    x = words(2, 6, E)
    assert DPFlashAttention(E, H, ledger=Ledger.memory())(x, return_privacy_stats=True)[1].epsilon_spent <= 1.0
    listed = DPFlashAttention(E, H, head_epsilons=[0.5] * H, ledger=Ledger.memory())
    assert 0.9 < listed(x, return_privacy_stats=True)[1].epsilon_spent < 2.0
    with pytest.raises(PrivacyParameterError, match="allow_infinite_heads"):
        DPFlashAttention(E, H, head_epsilons=[1.0, 1.0, 1.0, math.inf], ledger=Ledger.memory())(x)


def test_noise_of_the_next_call_is_what_was_set_and_so_is_its_price() -> None:
    ledger = Ledger.memory(delta=1e-5)
    module, x = DPFlashAttention(E, H, **PRIVATE, ledger=ledger), words(2, 6, E)
    module(x)
    module.set_noise_multiplier(1.5)
    stats = module(x, return_privacy_stats=True)[1]
    assert stats.noise_multiplier == 1.5
    assert stats.epsilon_spent > 1.0
    assert "built with epsilon=1.0" in repr(module)
    assert [line.mechanism for line in ledger.releases()] == ["gaussian", "gaussian(noise_multiplier=1.5)"]
    module.set_noise_multiplier(None)
    assert module(x, return_privacy_stats=True)[1].epsilon_spent <= 1.0
    with pytest.raises(PrivacyParameterError, match="noise_multiplier must be"):
        module.set_noise_multiplier(0.0)
    with pytest.raises(PrivacyParameterError, match="belongs to setting"):
        pair(setting="training")[1].set_noise_multiplier(1.0)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_important_heads_get_less_noise_and_the_total_stays(mechanism: str) -> None:
    module = DPFlashAttention(
        E,
        H,
        **PRIVATE,
        strategy="importance_based",
        head_importances=[1, 4, 16, 64],
        noise_mechanism=mechanism,
        ledger=Ledger.memory(),
    )
    stats = module(words(2, 6, E), return_privacy_stats=True)[1]
    assert stats.epsilon_spent <= 1.0
    scales = stats.head_noise_scales
    assert sorted(scales, reverse=True) == list(scales)
    power = 1 / 4 if mechanism == "gaussian" else 1 / 3  # std**2 ~ w**(-1/2); b**3 ~ 1 / w
    assert scales[0] / scales[3] == pytest.approx(64**power, rel=1e-3)
    with pytest.raises(PrivacyParameterError, match="one of them"):
        DPFlashAttention(E, H, strategy="importance_based", head_importances=[1] * H, head_epsilons=[1] * H)
    with pytest.raises(PrivacyParameterError, match='need strategy="importance_based"'):
        DPFlashAttention(E, H, head_importances=[1] * H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_need_no_half_precision_module(dtype: torch.dtype) -> None:
    module = DPFlashAttention(E, H, **PRIVATE, ledger=Ledger.memory())
    assert module(words(2, 6, E).to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, stats = module(words(2, 6, E), return_privacy_stats=True)
    assert out.dtype == torch.bfloat16
    assert stats.epsilon_spent <= 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_token_unit(dtype: torch.dtype) -> None:
    module = DPFlashAttention(
        E, H, **PRIVATE, unit="token", logit_bound=1.0, causal=True, dtype=dtype, ledger=Ledger.memory()
    )
    out, stats = module(words(2, 6, E).to(dtype), return_privacy_stats=True)
    assert out.dtype == dtype
    assert stats.unit == "token"
    assert stats.epsilon_spent <= 1.0
