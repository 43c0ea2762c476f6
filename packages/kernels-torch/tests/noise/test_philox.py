"""Known answers of Random123's distribution (kat_vectors, philox 4x32 with 10 rounds)."""

from __future__ import annotations

import pytest
import torch

from dpfa_kernels_torch.noise.philox import philox4x32

KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    words = philox4x32(tuple(torch.tensor(word) for word in counter), torch.tensor(key))
    assert tuple(words.tolist()) == answer


def test_many_counters_equal_one_at_a_time() -> None:
    key = torch.tensor([5, 6])
    column, row = torch.arange(4), torch.arange(3).unsqueeze(1)
    together = philox4x32((column, row, torch.tensor(7), torch.tensor(8)), key)
    assert together.shape == (3, 4, 4)
    one = philox4x32(tuple(torch.tensor(word) for word in (3, 2, 7, 8)), key)
    assert torch.equal(together[2, 3], one)
