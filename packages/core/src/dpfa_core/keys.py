"""One key for each purpose: HKDF-SHA256 (RFC 5869), so that no two streams share noise bits."""

from __future__ import annotations

import hashlib
import hmac

from dpfa_core.checks import require
from dpfa_core.spec import CONTRACT_VERSION

KEY_BYTES = 32


def derive_key(master: bytes, purpose: str) -> bytes:
    """32 key bytes for `purpose`, e.g. ``"release"``, ``"training"`` or ``"sampling"``.

    Guarantee: tested (RFC 5869, case 3 structure; distinct purposes give unrelated keys).
    Raises: PrivacyParameterError if `master` is shorter than 32 bytes.
    """
    require(len(master) >= KEY_BYTES, f"a master key must have at least {KEY_BYTES} bytes", len(master))
    return hkdf_sha256(master, info=f"dpfa/{CONTRACT_VERSION}/{purpose}".encode())


def hkdf_sha256(secret: bytes, *, info: bytes, salt: bytes = b"", length: int = KEY_BYTES) -> bytes:
    """RFC 5869 extract and expand."""
    extracted = hmac.digest(salt or bytes(hashlib.sha256().digest_size), secret, "sha256")
    output, block = b"", b""
    for index in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([index]), "sha256")
        output += block
    return output[:length]
