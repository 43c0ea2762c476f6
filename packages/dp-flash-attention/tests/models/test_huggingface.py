import builtins
import json
from pathlib import Path

import pytest
import torch

from dp_flash_attention.data.task import Records
from dp_flash_attention.models.huggingface import load_huggingface
from dpfa_core.errors import PrivacyParameterError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=10,
        num_labels=5,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_the_directorys_own_tokenizer_and_weights_are_used(directory: Path) -> None:
    module, encode = load_huggingface(directory, classes=3)
    tokens = encode(Records(("good film", "bad"), torch.tensor([0, 1])))
    assert tokens.tolist() == [[2, 5, 7, 3, 0, 0, 0, 0, 0, 0], [2, 6, 3, 0, 0, 0, 0, 0, 0, 0]]
    assert module(tokens).shape == (2, 3)


def test_a_row_depends_on_itself_and_nothing_is_dropped_at_random(directory: Path) -> None:
    module, encode = load_huggingface(directory, classes=2)
    module.train()
    tokens = encode(Records(("good film", "bad"), torch.tensor([0, 1])))
    logits = module(tokens)
    assert torch.equal(module(tokens), logits)
    torch.testing.assert_close(module(tokens[1:])[0], logits[1])


def test_the_new_head_follows_the_seed(directory: Path) -> None:
    first, again, other = (load_huggingface(directory, classes=2, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)


@pytest.mark.parametrize("config", [None, {"model_type": "no such model"}])
def test_a_wrong_directory_gets_one_sentence(tmp_path: Path, config: dict[str, str] | None) -> None:
    pytest.importorskip("transformers", reason="needs the package transformers")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PrivacyParameterError, match="save_pretrained") as caught:
        load_huggingface(tmp_path, classes=2)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "transformers":
            raise ImportError(name)
        return usual(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PrivacyParameterError, match="pip install transformers"):
        load_huggingface(tmp_path, classes=2)
