"""transformers' models as they are, built from tiny configurations, against one-sample-at-a-time autograd."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from training_models import assert_exact

from dpfa_core.errors import NotPrivateError
from dpfa_core.selection import backend
from dpfa_training import clipped_gradients, engine_of, make_private
from dpfa_training.recording import Recording
from dpfa_training.self_check import self_check
from dpfa_training.tape import Tape

transformers = pytest.importorskip("transformers")
WORDS, WIDTH, LENGTH = 50, 32, 7


def ids(rows, length=LENGTH):
    return torch.randint(1, WORDS, (rows, length))


def classes(module, batch):
    return F.cross_entropy(module(batch["x"]).logits, batch["y"], reduction="none")


def next_words(module, batch):
    logits = module(batch["x"]).logits[:, :-1]
    return F.cross_entropy(logits.mT, batch["x"][:, 1:], reduction="none").mean(1)


def answers(module, batch):
    logits = module(input_ids=batch["x"], decoder_input_ids=batch["y"]).logits
    return F.cross_entropy(logits[:, :-1].mT, batch["y"][:, 1:], reduction="none").mean(1)


def padded(module, batch):
    return F.cross_entropy(module(batch["x"], attention_mask=batch["m"]).logits, batch["y"], reduction="none")


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=WORDS, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=16, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2(tied=True):
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_channels=2,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )
    return transformers.T5ForConditionalGeneration(config)


def gemma():
    config = transformers.GemmaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return transformers.GemmaForCausalLM(config)


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


CASES = {
    "bert": (bert, padded, lambda n: {"x": ids(n), "m": mask(n), "y": torch.randint(0, 3, (n,))}),
    "distilbert": (distilbert, classes, lambda n: {"x": ids(n), "y": torch.randint(0, 3, (n,))}),
    "gpt2": (gpt2, next_words, lambda n: {"x": ids(n)}),
    "gpt2 untied": (lambda: gpt2(False), next_words, lambda n: {"x": ids(n)}),
    "llama": (llama, next_words, lambda n: {"x": ids(n)}),
    "vit": (vit, classes, lambda n: {"x": torch.randn(n, 2, 8, 8), "y": torch.randint(0, 3, (n,))}),
    "gemma": (gemma, next_words, lambda n: {"x": ids(n)}),
    "swin": (swin, classes, lambda n: {"x": torch.randn(n, 2, 16, 16), "y": torch.randint(0, 2, (n,))}),
    "t5": (t5, answers, lambda n: {"x": ids(n), "y": ids(n, 5)}),
}


def mask(rows):
    lengths = torch.randint(3, LENGTH + 1, (rows, 1))
    return (torch.arange(LENGTH) < lengths).long()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [3, LENGTH])
def test_transformers_model_as_it_is(case, rows, caplog):
    torch.manual_seed(0)
    build, losses, data = CASES[case]
    module = build().eval()
    with torch.no_grad():  # away from the zeros and ones that models start with
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert_exact(module, losses, data(rows))
    assert "once for each sample" not in caplog.text


class Attentions(TorchDispatchMode):
    """The attention kernels that run, and the softmaxes of what torch computes without one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name or "softmax" in name:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_a_private_forward_runs_the_attention_kernels_of_the_plain_one(case):
    torch.manual_seed(0)
    build, losses, data = CASES[case]
    module, batch = build().eval(), data(4)
    with Attentions() as plain:
        losses(module, batch)
    recording = Recording(module)
    recording.survey(lambda rows: losses(module, {name: value[rows] for name, value in batch.items()}), 4, batch)
    with Attentions() as private, recording.to(Tape(4, lambda tape: None), batch):
        losses(module, batch)
    assert private.seen == plain.seen
    # t5 and swin train a bias of their logits, for which torch has no kernel on the CPU
    assert case in ("t5", "swin") or "_scaled_dot_product_flash_attention_for_cpu" in plain.seen


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_autocast_never_reads_a_norm_far_too_small(case):
    torch.manual_seed(0)
    build, losses, data = CASES[case]
    module, batch = build().eval(), data(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def rounded(m, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(m, b).float()

    _, norms = clipped_gradients(module, rounded, batch, max_grad_norm=1.0)
    for index in range(4):  # what autograd makes of the same rounded passes
        own = {name: value[index : index + 1] for name, value in batch.items()}
        found = torch.autograd.grad(rounded(module, own).sum(), list(module.parameters()), allow_unused=True)
        norm = torch.cat([g.double().flatten() for g in found if g is not None]).norm()
        assert norm * (1 - 2**-7) <= norms[index] <= norm * (1 + 2**-5)


@pytest.mark.parametrize(
    ("case", "layers"), [("bert", ["query", "value"]), ("gpt2", ["c_attn", "c_proj"]), ("t5", ["q"])]
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_low_rank_adapters_of_peft(case, layers, decomposed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    build, losses, data = CASES[case]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False, use_dora=decomposed)
    module = peft.get_peft_model(build(), config).eval()
    assert 0 < sum(parameter.requires_grad for parameter in module.parameters()) < 30
    assert_exact(module, losses, data(3))


def checkpointed(case, reentrant):
    """(module that computes its blocks again, batch, loss, clipped gradients and norms without that)."""
    torch.manual_seed(0)
    build, losses, data = CASES[case]
    module, batch = build().eval(), data(3)
    truth = clipped_gradients(module, losses, batch, max_grad_norm=0.5)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    module.train()
    for layer in module.modules():  # dropout off, checkpointing on
        for name in ("dropout", "p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
    return module, batch, losses, *truth


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("case", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(case, reentrant):
    module, batch, losses, truth, norms = checkpointed(case, reentrant)
    if case == "t5" and reentrant:  # its first block hands the shared bias on to the others
        with pytest.raises(NotPrivateError, match="use_reentrant=False"):
            clipped_gradients(module, losses, batch, max_grad_norm=0.5)
        return
    sums, found = clipped_gradients(module, losses, batch, max_grad_norm=0.5)
    torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
    for name in truth:
        torch.testing.assert_close(sums[name], truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_with_dropout_trains_privately_in_a_plain_loop(autocast):
    torch.manual_seed(0)
    module, batch = bert().train(), CASES["bert"][2](24)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = TensorDataset(batch["x"], batch["m"], batch["y"])
    module, optimizer, loader = make_private(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3),
        data_loader=DataLoader(data, batch_size=6),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        seed=3,
    )
    for x, m, y in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(module(x, attention_mask=m).logits.float(), y)
        module.eval()
        module(x)
        module.train()
        loss.backward()
        assert {type(p) for p in module.parameters()} == {torch.nn.Parameter}
        optimizer.step()
    engine = engine_of(module)
    assert engine.steps == len(loader)
    assert engine.checked_samples >= 2
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("case", ["gpt2", "t5"])
def test_fault_3_the_loss_that_a_language_model_computes_itself_is_refused(case):
    torch.manual_seed(0)
    module = CASES[case][0]()
    batch = {"input_ids": ids(6), "labels": ids(6)}  # of equal length: the batch itself shows nothing
    with pytest.raises(NotPrivateError, match="normalised by other samples"):
        self_check(Recording(module), backend("torch"), (), batch, 6, "mean")


def test_the_loss_that_a_classifier_computes_itself_passes():
    torch.manual_seed(0)
    batch = {"input_ids": ids(6), "attention_mask": mask(6), "labels": torch.randint(0, 3, (6,))}
    assert self_check(Recording(bert()), backend("torch"), (), batch, 6, "mean") == 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("case", ["bert", "t5"])
def test_reentrant_checkpoints_in_a_plain_loop_work_or_are_refused_by_name(case):
    build, losses, data = CASES[case]
    module, batch = build().train(), data(16)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    rows = [{name: value[i] for name, value in batch.items()} for i in range(16)]
    module, optimizer, loader = make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(rows, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    engine = engine_of(module)
    refused = case == "t5"  # its first block hands the shared bias on to the others
    with pytest.raises(NotPrivateError, match="use_reentrant=False") if refused else contextlib.nullcontext():
        for part in loader:
            losses(module, part).mean().backward()
            optimizer.step()
    assert engine.steps == (0 if refused else 2)
