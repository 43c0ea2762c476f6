"""The user's own pre-trained text model, from a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.data.task import Records
from dpfa_core.errors import PrivacyParameterError

LENGTH = 128


class HuggingFaceClassifier(nn.Module):
    """Gives a Hugging Face sequence classifier the one-tensor door of the other models.

    Guarantee: tested. With attention masked at padding, a row of the output depends on the same row of the input.

    Args:
        model: a sequence classifier; its dropout is switched off.
        padding: number of the padding token.
    """

    def __init__(self, model: Any, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of token numbers (B, length), int64."""
        real = (tokens != self.padding).long()
        return self.model(input_ids=tokens, attention_mask=real).logits  # type: ignore[no-any-return]


def load_huggingface(path: Path, *, classes: int, seed: int = 0) -> tuple[nn.Module, Callable[[Records], Tensor]]:
    """A sequence classifier and the encoding by its own saved tokenizer, which is not fitted to anything here.

    Guarantee: tested. Nothing is downloaded and no code of the directory is run.

    Args:
        path: directory with config.json, weights and tokenizer files.
        classes: number of logits; a saved head of another size is replaced by a random one.
        seed: of that head.

    Raises:
        PrivacyParameterError: transformers is not installed, or the directory is no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise PrivacyParameterError(
            "a Hugging Face model directory needs the package transformers: pip install transformers, "
            "or leave --model out."
        ) from error
    if not (path / "config.json").is_file():
        raise PrivacyParameterError(
            f"expected a Hugging Face model directory with a config.json, got {path}: "
            "give the folder that save_pretrained wrote, or leave --model out."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=classes,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
    except Exception as error:  # transformers raises many kinds for a broken directory
        reason = str(error).strip().splitlines()[0]
        raise PrivacyParameterError(
            f"cannot load a text classifier and its tokenizer from {path}: {reason}. "
            "Save both into one folder with save_pretrained."
        ) from error
    if tokenizer.pad_token_id is None:
        raise PrivacyParameterError(
            f"the tokenizer in {path} has no padding token: set tokenizer.pad_token and save it again."
        )
    length = min(LENGTH, int(getattr(model.config, "max_position_embeddings", LENGTH) or LENGTH))

    def encode(records: Records) -> Tensor:
        texts = list(records.texts)
        return tokenizer(  # type: ignore[no-any-return]
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]

    return HuggingFaceClassifier(model, tokenizer.pad_token_id), encode
