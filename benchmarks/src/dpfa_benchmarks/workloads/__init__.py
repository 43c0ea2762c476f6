"""Models and batches that the training cases share, by name; one file for each model."""

from __future__ import annotations

from dpfa_benchmarks.workloads.attention import ATTENTION
from dpfa_benchmarks.workloads.encoder import ENCODER
from dpfa_benchmarks.workloads.gpt import GPT, GPT_TIED
from dpfa_benchmarks.workloads.text import TEXT
from dpfa_benchmarks.workloads.tiny_bert import TINY_BERT
from dpfa_benchmarks.workloads.vit import VIT
from dpfa_benchmarks.workloads.vit197 import VIT197
from dpfa_benchmarks.workloads.workload import Model, Workload

MODELS: dict[str, Model] = {
    "vit": VIT,
    "text": TEXT,
    "encoder": ENCODER,
    "gpt": GPT,
    "gpt_tied": GPT_TIED,
    "vit197": VIT197,
    "attention": ATTENTION,
    "tiny_bert": TINY_BERT,
}


def model_of(name: str) -> Model:
    """Raises: ValueError for a name that is not in ``MODELS``."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}.")
    return MODELS[name]


__all__ = ["MODELS", "Model", "Workload", "model_of"]
