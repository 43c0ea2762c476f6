"""A frozen encoder made from public texts: word vectors, and an attention that pools a text by their rarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn

from dp_flash_attention import DPFlashAttention
from dpfa_benchmarks.real_text.docstrings import WORDS, Text

DIM = 12
"""Columns of a word vector, and so of the noise. Chosen on public texts: 8, 12, 16, 24, 32 and 48 were tried."""

VOCABULARY = 6000
CLIPPED = 0.7
"""Share of the public texts whose pooled row reaches the clip."""

HIDDEN = -30.0
"""Logit of padding: no weight, so that a text's length is part of its record and no mask is public."""


class PublicEncoder(nn.Module):
    """Word numbers [n, words] to hidden states [n, words, DIM + 1]: the word's vector, and how much it weighs.

    Latent semantic analysis of the public texts gives the vectors, without the first direction, which is how common a
    word is; each has norm 1. A word's weight in a text is its inverse document frequency.
    """

    def __init__(self, public: Sequence[Text]) -> None:
        super().__init__()
        texts_of = Counter(word for text in public for word in set(text))
        words = [word for word, count in texts_of.most_common(VOCABULARY) if count >= 3]
        self.numbers = {word: number for number, word in enumerate(words, start=1)}
        rarity = np.log(len(public) / np.array([texts_of[word] for word in words]))
        numbers = self.ids(public)
        vectors = _vectors(numbers, rarity)
        states = np.zeros((len(words) + 1, DIM + 1), dtype=np.float32)
        states[0, DIM], states[1:, :DIM], states[1:, DIM] = HIDDEN, vectors, np.log(rarity)
        self.states = nn.Embedding.from_pretrained(torch.from_numpy(states))
        self.eval()
        self.centre, self.scale = torch.zeros(DIM), 1.0
        pooled = self.pool(numbers)
        self.centre = pooled.mean(0)
        self.scale = 1.0 / float((pooled - self.centre).norm(dim=1).quantile(1.0 - CLIPPED))
        rows = self.pool(numbers)
        self.covariance = (rows / rows.norm(dim=1, keepdim=True).clamp_min(1.0)).double().T.cov()
        """[DIM, DIM], of the public texts' clipped rows."""

    def ids(self, texts: Sequence[Text]) -> Tensor:
        """int64 [n, WORDS]; words that no public text has are left out, 0 is padding."""
        rows = torch.zeros(len(texts), WORDS, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            known = [self.numbers[word] for word in text if word in self.numbers]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.states(ids)  # type: ignore[no-any-return]

    @property
    def query(self) -> Tensor:
        """[1, DIM]: the public row that asks every text."""
        return torch.eye(1, DIM)

    def attention(self, epsilon: float, **options: Any) -> DPFlashAttention:
        """The release that pools a text to one row: centred, scaled and clipped by public numbers."""
        made = DPFlashAttention(DIM, 1, epsilon, kdim=DIM + 1, vdim=DIM + 1, clip="output", clip_norm=1.0, **options)
        with torch.no_grad():
            for weight in (made.q_proj_weight, made.k_proj_weight, made.v_proj_weight, made.in_proj_bias):
                weight.zero_()  # type: ignore[union-attr]
            made.q_proj_weight[0, 0] = DIM**0.5  # against the softmax's own scale
            made.k_proj_weight[0, DIM] = 1.0
            made.v_proj_weight[:, :DIM] = self.scale * torch.eye(DIM)
            made.in_proj_bias[2 * DIM :] = -self.scale * self.centre  # type: ignore[index]
            made.out_proj.weight.copy_(torch.eye(DIM))
        return made.eval()

    @torch.no_grad()
    def pool(self, ids: Tensor) -> Tensor:
        """[n, DIM], what the attention releases, without clip and noise: for whoever owns the texts."""
        parts = []
        for part in ids.split(1024):
            states = self(part)
            weights = states[:, :, DIM:].softmax(1)
            parts.append(self.scale * ((weights * states[:, :, :DIM]).sum(1) - self.centre))
        return torch.cat(parts)


def _vectors(numbers: Tensor, rarity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[words, DIM] by latent semantic analysis, each of norm 1."""
    rows, places = (numbers > 0).nonzero(as_tuple=True)
    columns = numbers[rows, places].numpy() - 1
    counts = sparse.csr_matrix((rarity[columns], (rows.numpy(), columns)), shape=(len(numbers), len(rarity)))
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(1)).ravel())
    texts = sparse.diags(1.0 / np.maximum(norms, 1e-9)) @ counts
    vectors = TruncatedSVD(DIM + 1, algorithm="arpack", random_state=0).fit(texts).components_[1:].T
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)  # type: ignore[no-any-return]
