"""Clipping by head in transformers' models: which rows and columns go together, and what each may add."""

import math

import pytest
import torch
import torch.nn.functional as F

from dpfa_training import clipped_gradients
from dpfa_training.heads import head_cuts
from dpfa_training.threshold_groups import clipping_for

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **SIZES)
    )


def llama():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**heads, **shape, **SIZES, pad_token_id=0))


def heads_of(module, name):
    """The heads of the rows or columns of a parameter, one after the other."""
    cuts, labels = head_cuts(module, [own for own, _ in module.named_parameters()])
    cut = cuts[name]
    pieces = zip(cut.names(name), cut.sizes, strict=True)
    return cut.axis, [int(labels[piece].split()[-1]) for piece, size in pieces for _ in range(size)]


def test_rows_and_columns_go_with_their_heads():
    attention = "transformer.h.1.attn"
    two = [0] * 16 + [1] * 16
    assert heads_of(gpt2(), f"{attention}.c_attn.weight") == (1, two * 3)
    assert heads_of(gpt2(), f"{attention}.c_attn.bias") == (0, two * 3)
    assert heads_of(gpt2(), f"{attention}.c_proj.weight") == (0, two)
    attention = "model.layers.0.self_attn"
    four = [head for head in range(4) for _ in range(8)]
    assert heads_of(llama(), f"{attention}.q_proj.weight") == (0, four)
    assert heads_of(llama(), f"{attention}.o_proj.weight") == (1, four)
    assert heads_of(llama(), f"{attention}.k_proj.weight") == (0, [0] * 8 + [2] * 8)


def test_projections_of_other_layers_stay_whole():
    cuts, _ = head_cuts(gpt2(), [name for name, _ in gpt2().named_parameters()])
    assert all(".attn.c_" in name for name in cuts)
    assert len(cuts) == 2 * 3


@pytest.mark.parametrize("build", [gpt2, llama])
def test_every_head_is_clipped_at_its_own_threshold(build):
    torch.manual_seed(0)
    module, words = build(), torch.randint(1, 50, (1, 7))

    def losses(model, batch):
        return 1e5 * F.cross_entropy(model(batch).logits[:, :-1].mT, batch[:, 1:], reduction="none").mean(1)

    sums, _ = clipped_gradients(module.eval(), losses, words, max_grad_norm=1.0, clipping="per_head")
    clipping = clipping_for("per_head", 1.0, module)
    squares = [0.0] * len(clipping.thresholds)
    for name, total in sums.items():
        cut = clipping.cuts.get(name)
        parts = [total] if cut is None else total.split(list(cut.sizes), cut.axis)
        for piece, part in zip([name] if cut is None else cut.names(name), parts, strict=True):
            squares[clipping.group(piece)] += float(part.double().square().sum())
    for square, threshold in zip(squares, clipping.thresholds, strict=True):
        assert threshold * (1 - 1e-4) <= math.sqrt(square) <= threshold
    whole, _ = clipped_gradients(module, losses, words, max_grad_norm=math.inf)
    for name, total in sums.items():  # a positive multiple, piece by piece
        cut = clipping.cuts.get(name)
        sizes, axis = ([total.shape[0]], 0) if cut is None else (list(cut.sizes), cut.axis)
        for ours, theirs in zip(total.split(sizes, axis), whole[name].split(sizes, axis), strict=True):
            one, other = ours.double(), theirs.double()
            torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=0, atol=1e-5)
