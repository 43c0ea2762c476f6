from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpfa_attention import check_release_paths, register_dp_attention, release_attention
from dpfa_attention.transformers_attention import _alike, dp_attention, shown_keys
from dpfa_core.errors import BudgetExhausted, NotPrivateError, PrivacyParameterError
from dpfa_core.ledger import Ledger

transformers = pytest.importorskip("transformers", reason="needs the package transformers")


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
TEXT: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 16}


def bert(**more: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT, **more))


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=4, **more)
    return transformers.GPT2LMHeadModel(config)


def llama(**more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2, **more))


def mistral(**more: Any) -> nn.Module:
    config = transformers.MistralConfig(**SIZES, **TEXT, num_key_value_heads=2, sliding_window=3, **more)
    return transformers.MistralForCausalLM(config)


def vit(**more: Any) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, **more))


def t5(**more: Any) -> nn.Module:
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, **more)
    return transformers.T5ForConditionalGeneration(config)


TEXTS = [bert, gpt2, llama, mistral]
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
OPEN = {"epsilon": math.inf, "delta": 1e-5}
PROMISE = {"epsilon": 8.0, "delta": 1e-6}


def made(build: Callable[..., nn.Module], **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(**more).eval()


def batch_of(build: Callable[..., nn.Module], mask: Tensor | None = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    if build is vit:
        return {"pixel_values": torch.randn(3, 3, 8, 8)}
    ids = {"input_ids": torch.randint(3, 30, (3, 7))}
    return ids if mask is None else ids | {"attention_mask": mask}


@torch.no_grad()
def run(model: nn.Module, **batch: Any) -> Tensor:
    return model(**batch)[0]


@pytest.mark.parametrize("build", [*TEXTS, vit], ids=lambda build: build.__name__)
def test_without_noise_a_model_computes_what_it_computed(build, ledger) -> None:
    model, batch = made(build), batch_of(build)
    wanted = run(model, **batch)
    releases = release_attention(model, **OPEN, ledger=ledger)
    torch.testing.assert_close(run(model, **batch), wanted)
    assert releases.get_privacy_spent()["forward_count"] == 2
    assert math.isinf(ledger.spent())


@pytest.mark.parametrize("build", TEXTS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("mask", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
def test_padding_is_not_attended(build, mask) -> None:
    model, batch = made(build), batch_of(build, mask)
    real = mask.bool()
    wanted = run(model, **batch)[real]
    release_attention(model, **OPEN)
    out = run(model, **batch)[real]
    torch.testing.assert_close(out, wanted)
    other = batch | {"input_ids": torch.where(real, batch["input_ids"], batch["input_ids"] - 2)}
    torch.testing.assert_close(run(model, **other)[real], out, rtol=0, atol=0)
    # the check can fail: without the mask the padded tokens count
    if build is bert:
        assert not torch.allclose(run(model, input_ids=other["input_ids"])[real], out)


def test_every_layer_and_call_is_charged_to_one_ledger(ledger) -> None:
    model, batch = made(llama), batch_of(llama)
    releases = release_attention(model, **PROMISE, ledger=ledger)
    assert releases.layers == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    first, second = run(model, **batch), run(model, **batch)
    assert not torch.allclose(first, second)
    assert sum(count for _, count in ledger.events()) == 4
    spent = releases.get_privacy_spent()
    assert spent["forward_count"] == 4
    assert 8.0 < float(spent) <= 4 * 8.0
    assert spent["ledger_epsilon"] == ledger.spent()


def test_what_an_attention_returns_has_noise_of_the_size_that_was_asked_for() -> None:
    model, x = made(bert), torch.randn(3, 40, 16)
    layer = model.encoder.layer[0].attention.self
    release_attention(model, **OPEN, clip_norm=0.5)
    with torch.no_grad():
        exact = layer(x)[0]
        release_attention(model, epsilon=100.0, delta=1e-5, clip_norm=0.5, mechanism="gaussian(noise_multiplier=3.0)")
        noise = (layer(x)[0] - exact) / (3.0 * 2 * 0.5 * math.sqrt(40 * 4))
    # 1920 numbers: their mean square is within 6 * sqrt(2 / 1920) of 1
    assert abs(float(noise.square().mean()) - 1.0) < 0.2


def test_a_spent_budget_stops_a_forward() -> None:
    ledger = Ledger.memory(unit="sequence", relation="replace", delta=1e-5, budget=10.0)
    model = made(gpt2)
    release_attention(model, **PROMISE, ledger=ledger)
    with pytest.raises(BudgetExhausted):
        run(model, **batch_of(gpt2))
    assert ledger.spent() <= 10.0


def test_terms_of_tokens_reach_the_release() -> None:
    ledger = Ledger.memory(unit="token", relation="replace", delta=1e-5)
    model = made(llama)
    terms = {"unit": "token", "logit_bound": 1.0, "mechanism": "laplace", "clip_norm": 2.0}
    releases = release_attention(model, epsilon=4.0, delta=1e-6, ledger=ledger, **terms)
    run(model, **batch_of(llama, RIGHT))
    assert releases.get_privacy_spent()["privacy_mechanism"] == "laplace"
    assert {line.mechanism for line in ledger.releases()} == {"laplace"}


def test_a_model_without_terms_is_refused() -> None:
    register_dp_attention()
    model = made(bert, attn_implementation="dp_attention")
    with pytest.raises(NotPrivateError, match=r"got a BertSelfAttention without any; call release_attention\(model"):
        run(model, **batch_of(bert))


def test_a_model_built_with_the_name_runs_with_terms() -> None:
    register_dp_attention()
    model = made(bert, attn_implementation="dp_attention")
    releases = release_attention(model, **PROMISE)
    run(model, **batch_of(bert))
    assert releases.get_privacy_spent()["forward_count"] == 2


@pytest.mark.parametrize("build", [bert, gpt2, llama, vit], ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_forward_that_takes_another_attention_is_refused(build, name) -> None:
    model = made(build)
    release_attention(model, **PROMISE)
    model.set_attn_implementation(name)
    with pytest.raises(NotPrivateError, match=f"its attn_implementation is '{name}' now"):
        run(model, **batch_of(build))
    release_attention(model, **OPEN)
    run(model, **batch_of(build))


def test_a_copy_is_charged_by_itself_to_the_same_ledger(ledger) -> None:
    model = made(gpt2)
    releases = release_attention(model, **PROMISE, ledger=ledger)
    run(copy.deepcopy(model), **batch_of(gpt2))
    assert releases.get_privacy_spent()["forward_count"] == 0
    assert sum(count for _, count in ledger.events()) == 2


def test_dropout_of_attention_is_refused_with_the_remedy() -> None:
    model = made(bert).train()
    release_attention(model, **PROMISE)
    with pytest.raises(PrivacyParameterError, match=r"BertSelfAttention must be 0 in a release, got 0\.1"):
        run(model, **batch_of(bert))


@pytest.mark.parametrize("build", [bert, gpt2, llama, vit], ids=lambda build: build.__name__)
def test_weights_are_refused(build) -> None:
    model = made(build)
    release_attention(model, **PROMISE)
    with pytest.raises(NotPrivateError, match="output_attentions must be False, got True"):
        run(model, **batch_of(build), output_attentions=True)


def test_the_weights_of_an_attention_alone_are_refused() -> None:
    model = made(bert)
    release_attention(model, **PROMISE)
    with pytest.raises(NotPrivateError, match="output_attentions must be False"):
        model.encoder.layer[0].attention.self(torch.randn(1, 3, 16), output_attentions=True)


@pytest.mark.parametrize("build", [gpt2, llama], ids=lambda build: build.__name__)
def test_a_cache_is_refused_unless_asked_for(build) -> None:
    model, batch = made(build), batch_of(build)
    release_attention(model, **PROMISE)
    with torch.no_grad():
        assert "past_key_values" not in model(**batch)
    for asked in ({"use_cache": True}, {"cache": transformers.DynamicCache()}):
        with pytest.raises(NotPrivateError, match="must run without a cache of keys and values"):
            run(model, **batch, **asked)


@pytest.mark.parametrize("build", [gpt2, llama, mistral], ids=lambda build: build.__name__)
@pytest.mark.parametrize("mask", [None, RIGHT.flip(1)], ids=["full", "padded left"])
def test_a_cache_that_grows_gives_what_it_gave(build, mask, ledger) -> None:
    model, batch = made(build), batch_of(build, mask)
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(**batch, **asked)
    release_attention(model, **OPEN, ledger=ledger, use_cache=True)
    assert torch.equal(model.generate(**batch, **asked), wanted)
    assert sum(count for _, count in ledger.events()) == 2 * 4
    release_attention(model, **OPEN)
    assert torch.equal(model.generate(**batch, **asked), wanted)


def test_a_static_cache_is_refused() -> None:
    model = made(llama)
    release_attention(model, **OPEN, use_cache=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(PrivacyParameterError, match="the last query must stand at the last key, got '7 queries"):
        run(model, **batch_of(llama), cache=cache, use_cache=True)


def test_packed_texts_are_refused() -> None:
    model = made(llama)
    release_attention(model, **OPEN)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(PrivacyParameterError, match="position_ids that start anew within a row"):
        run(model, **batch_of(llama), position_ids=places)


def test_a_bias_of_position_is_refused_by_name() -> None:
    model = made(t5)
    release_attention(model, **OPEN)
    with pytest.raises(PrivacyParameterError, match="got 'position_bias from T5Attention"):
        run(model, **batch_of(t5), decoder_input_ids=torch.ones(3, 2, dtype=torch.long))


def test_cross_attention_is_refused() -> None:
    model = made(bert, is_decoder=True, add_cross_attention=True)
    release_attention(model, **OPEN)
    with pytest.raises(PrivacyParameterError, match="got 'cross-attention in BertCrossAttention"):
        run(model, **batch_of(bert), encoder_hidden_states=torch.randn(3, 4, 16))


def test_other_keys_than_the_queries_own_are_refused() -> None:
    model = made(vit)
    release_attention(model, **OPEN)
    query, key = torch.randn(1, 4, 3, 4), torch.randn(1, 4, 5, 4)
    with pytest.raises(PrivacyParameterError, match="got '3 queries beside 5 keys in ViTAttention'"):
        dp_attention(model.layers[0].attention, query, key, key, None)


def test_an_attention_of_somebodys_own_class_is_found() -> None:
    model = made(vit)
    for layer in model.layers:
        layer.attention.__class__ = type("Mine", (type(layer.attention),), {})
    assert len(release_attention(model, **OPEN).layers) == 2


def test_an_attention_that_asks_no_registry_is_refused() -> None:
    model = made(bert)
    model.pooler.dense = nn.MultiheadAttention(16, 4)
    with pytest.raises(PrivacyParameterError, match=r"got 'pooler.dense, a MultiheadAttention that computes its own"):
        release_attention(model, **PROMISE)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be"),
        ({"unit": "token"}, "needs a logit_bound"),
        ({"unit": "user"}, "unit must be"),
        ({"dropout": 0.1}, "further terms must be among .* got 'dropout'"),
        ({"mechanism": "nonsense"}, "mechanism must be .* got 'nonsense'"),
        ({"upstream_gradients": "open"}, "upstream_gradients"),
    ],
)
def test_terms_that_no_call_could_use_are_refused_before_any(terms, message) -> None:
    model = made(vit)
    with pytest.raises(Exception, match=message):
        release_attention(model, **PROMISE | terms)
    assert model.config._attn_implementation == "sdpa"


def test_a_module_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="model must be one of transformers, got 'Linear'"):
        release_attention(nn.Linear(2, 2), **PROMISE)


def test_a_matrix_of_the_caller_is_read() -> None:
    model, batch = made(bert), batch_of(bert)
    seen = RIGHT.bool()[:, None, None].expand(3, 1, 7, 7)
    wanted = run(model, **batch, attention_mask=seen)
    release_attention(model, **OPEN)
    real = RIGHT.bool()
    torch.testing.assert_close(run(model, **batch, attention_mask=seen)[real], wanted[real])


@pytest.mark.parametrize("rule", [None, "block", "allow"])
def test_a_backward_stops_where_it_was_told(rule) -> None:
    model = made(vit)
    release_attention(model, **PROMISE, upstream_gradients=rule)
    loss = model(**batch_of(vit))[0].square().sum()
    query, output = (getattr(model.layers[0].attention, name).weight for name in ("q_proj", "o_proj"))
    if rule is None:
        with pytest.raises(NotPrivateError, match="a backward pass must stop at the release"):
            loss.backward()
        return
    loss.backward()
    assert output.grad is not None
    assert (query.grad is not None) == (rule == "allow")


def test_gradient_checkpointing_charges_once(ledger) -> None:
    model = made(llama).train()
    release_attention(model, **PROMISE, ledger=ledger, upstream_gradients="allow")
    model.activation_checkpointing_enable()
    model(**batch_of(llama), labels=batch_of(llama)["input_ids"]).loss.backward()
    assert sum(count for _, count in ledger.events()) == 2
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_the_residual_of_a_block_is_named_as_a_leak(ledger) -> None:
    model = made(gpt2)
    release_attention(model, **PROMISE, ledger=ledger)
    block = model.transformer.h[0]
    report = check_release_paths(block, torch.randn(1, 3, 16))
    assert report.releases == ("attn",)
    (leak,) = report.leaks
    assert leak.kind == "output"
    assert leak.steps[0] == "(top): add"
    assert check_release_paths(block.attn, torch.randn(1, 3, 16))
    assert not list(ledger.events())


def test_the_mask_function_makes_no_matrix() -> None:
    from transformers.masking_utils import causal_mask_function

    shown = shown_keys(2, 5, 5, mask_function=causal_mask_function, attention_mask=torch.ones(2, 3))
    assert shown.causal
    assert shown.keys is not None
    assert shown.keys.tolist() == [[True] * 3 + [False] * 2] * 2


def test_patterns_are_compared_by_what_they_are_made_of() -> None:
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_causal_mask_function

    three, four = (sliding_window_causal_mask_function(width) for width in (3, 4))
    assert _alike(three, sliding_window_causal_mask_function(3))
    assert not _alike(three, four)
    assert not _alike(three, and_masks(three, causal_mask_function))
    assert not _alike(three, causal_mask_function)


def test_an_attention_that_does_not_say_what_it_sees_is_refused() -> None:
    model = made(vit)
    release_attention(model, **OPEN)
    layer = model.layers[0].attention
    del layer.is_causal
    with pytest.raises(PrivacyParameterError, match="ViTAttention must say what its queries see"):
        dp_attention(layer, *(torch.randn(1, 4, 3, 4) for _ in range(3)), None)


def test_without_transformers_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(PrivacyParameterError, match=r"pip install 'dpfa-attention\[transformers\]'"):
        release_attention(nn.Linear(1, 1), **PROMISE)
