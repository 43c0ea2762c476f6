"""Which of the user's records are kept for testing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def keyed_split(contents: Iterable[bytes], *, seed: int, test_share: float) -> Tensor:
    """Marks the test records by a keyed hash of each record's own content.

    Guarantee: tested. Whether a record is a test record depends on itself and the seed alone, so adding or removing
    one record moves no other one between the parts, and equal records never stand on both sides.

    Args:
        contents: the records, without their labels.
        seed: chooses the split; any integer.
        test_share: expected share of test records, in (0, 1).

    Returns:
        bool (N,), true for test records.
    """
    key = hashlib.sha256(f"dpfa/1/split/{seed}".encode()).digest()
    bound = int(test_share * 2**64)
    return torch.tensor(
        [
            int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8).digest(), "big") < bound
            for content in contents
        ],
        dtype=torch.bool,
    )
