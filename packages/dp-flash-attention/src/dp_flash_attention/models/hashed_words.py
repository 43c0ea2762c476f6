"""Words to numbers without a vocabulary, so nothing is fitted on private texts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class HashedWords:
    """Each lower-case word or mark becomes the CRC-32 of its letters, folded into 1 .. buckets; 0 is padding.

    Guarantee: tested. A text's numbers depend on that text alone and are the same on every machine.

    Args:
        buckets: how many numbers there are besides the padding.
        length: words kept of a text, from its start.
    """

    buckets: int = 8192
    length: int = 96

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Word numbers, int64 (len(texts), length), padded with 0 at the end."""
        numbers = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in enumerate(texts):
            words = _WORD.findall(text.lower())[: self.length]
            numbers[row, : len(words)] = torch.tensor(
                [1 + zlib.crc32(word.encode()) % self.buckets for word in words], dtype=torch.int64
            )
        return numbers
