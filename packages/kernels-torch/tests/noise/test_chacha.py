"""Known answers of RFC 8439, and the fast twin against the truth."""

from __future__ import annotations

import struct

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.draw import chacha_run, fast_chacha_run
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_kernels_torch.noise.keystream import keystream
from dpfa_kernels_torch.noise.words32 import from_uint32

BLOCK_KEY = bytes(range(32))
BLOCK_NONCE = bytes.fromhex("000000090000004a00000000")
BLOCK = """
10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e
d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e
"""

FIRST_VECTORS = [
    (
        0,
        bytes(32),
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        1,
        bytes(32),
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        1,
        bytes(31) + b"\x01",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
]


def truth(key: bytes, block: int, stream: tuple[int, int, int]) -> bytes:
    words = chacha20(torch.tensor(struct.unpack("<8I", key)), tuple(torch.tensor(word) for word in (block, *stream)))
    return struct.pack("<16I", *words.tolist())


def test_rfc8439_block_function() -> None:
    """Section 2.3.2."""
    assert truth(BLOCK_KEY, 1, struct.unpack("<3I", BLOCK_NONCE)) == bytes.fromhex(BLOCK)


@pytest.mark.parametrize(("block", "key", "answer"), FIRST_VECTORS)
def test_rfc8439_block_vectors(block: int, key: bytes, answer: str) -> None:
    """Appendix A.1, test vectors 1 to 3."""
    assert truth(key, block, (0, 0, 0)) == bytes.fromhex(answer)


@pytest.mark.parametrize(
    ("first", "stream"),
    [(0, (0, 0, 0)), (7, (1, 2, 3)), (2**32 - 40, (2**32 - 1, 2**32 - 1, 2**31))],
)
def test_keystream_equals_block_function_bit_for_bit(first: int, stream: tuple[int, int, int]) -> None:
    key = bytes(range(100, 132))
    words = torch.tensor(struct.unpack("<8I", key))
    numbers = first + torch.arange(40)
    expected = chacha20(words, (numbers, *(torch.tensor(word) for word in stream)))
    assert torch.equal(from_uint32(keystream(key, first, 40, stream)), expected.flatten())


def test_fast_run_equals_the_run_of_any_device() -> None:
    key = KeySource(4, generator="chacha20").key("release")
    streams = torch.tensor([[0, 0, 0], [1, 2, 3], [2**32 - 1, 2**31, 5]])
    assert torch.equal(chacha_run(key, 3, 21, streams), fast_chacha_run(key, 3, 21, streams))


@pytest.mark.parametrize("first", [-1, 2**32 - 39])
def test_keystream_refuses_to_wrap(first: int) -> None:
    with pytest.raises(PrivacyParameterError, match=r"a run of blocks must"):
        keystream(bytes(32), first, 40, (0, 0, 0))
