"""HKDF-SHA256 against RFC 5869, appendix A, and the separation of purposes."""

from __future__ import annotations

import pytest

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.keys import derive_key, hkdf_sha256

CASES = [
    (
        bytes([0x0B] * 22),
        bytes(range(0x0D)),
        bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        bytes([0x0B] * 22),
        b"",
        b"",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "expected"), CASES)
def test_hkdf_gives_the_known_answers(secret: bytes, salt: bytes, info: bytes, expected: str) -> None:
    length = len(expected) // 2
    assert hkdf_sha256(secret, info=info, salt=salt, length=length).hex() == expected


def test_a_derived_key_is_hkdf_with_the_purpose_as_info() -> None:
    master = bytes(range(32))
    assert derive_key(master, "release") == hkdf_sha256(master, info=b"dpfa/1/release")


def test_purposes_and_masters_give_different_keys() -> None:
    masters = [bytes([value] * 32) for value in range(4)]
    keys = {derive_key(m, purpose) for m in masters for purpose in ("release", "training", "sampling")}
    assert len(keys) == 12
    assert {len(key) for key in keys} == {32}


def test_a_short_master_key_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="a master key must have at least 32 bytes, got 31"):
        derive_key(bytes(31), "release")
