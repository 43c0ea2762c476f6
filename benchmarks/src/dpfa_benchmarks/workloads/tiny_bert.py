"""BERT of two layers, by transformers, untouched but for its dropout, which is off."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from dpfa_benchmarks.case import Skipped
from dpfa_benchmarks.workloads.workload import Model, Workload, fresh, words_by_class


def _build(batch: int, toy: bool) -> Workload:
    """Raises: Skipped without transformers."""
    if find_spec("transformers") is None:
        raise Skipped('tiny_bert needs transformers, which is not installed: pip install "transformers>=4.50".')
    from transformers import BertConfig, BertForSequenceClassification

    width, length, words = (16, 10, 60) if toy else (128, 64, 30522)
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        attn_implementation="sdpa",
    )

    def make() -> nn.Module:
        model: nn.Module = BertForSequenceClassification(config).train()
        return model

    tokens, labels = words_by_class(batch, length, words, first=1)  # 0 is its padding
    return Workload(fresh(make), tokens, labels)


TINY_BERT = Model(batch=32, build=_build)
