"""Which noise of a seed was used on what: so that noise is repeated only on the very same sum.

Two sums that differ and share their noise reveal the difference. A seeded run writes down, before each noised
gradient exists, a keyed digest of what the noise is added to. A step that is redone after a crash, or by another
run with the same seed, then shows whether it is the same release.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

_END = "."


class StepJournal:
    """Lines of (key, step, digest) in a file of its owner's; durable before ``admits`` returns.

    Guarantee: tested. Neither the key nor a sum can be told from the lines by who cannot guess the key.
    """

    def __init__(self, path: str | os.PathLike[str], secret: bytes) -> None:
        self.path, self._secret = Path(path), secret
        self.key = hashlib.blake2b(b"key", key=secret, digest_size=8).hexdigest()
        self._known: dict[int, str] = {}
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                fields = line.split()
                # a line cut by a crash was not durable, so its step was not taken
                if len(fields) == 4 and fields[3] == _END and fields[0] == self.key:
                    self._known.setdefault(int(fields[1]), fields[2])

    def admits(self, step: int, settings: str, sums: Mapping[str, torch.Tensor]) -> bool:
        """Whether the noise of `step` may be added to `sums`: it was never used, or on the same bits.

        Args: `settings` on which the noised value depends besides the sums.
        """
        found = hashlib.blake2b(f"{step}/{settings}".encode(), key=self._secret, digest_size=16)
        for name, value in sorted(sums.items()):
            found.update(f"/{name}/{value.dtype}{tuple(value.shape)}/".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest = found.hexdigest()
        before = self._known.setdefault(step, digest)
        if before != digest:
            return False
        self.write(step, digest)
        return True

    def write(self, step: int, digest: str) -> None:
        """Append one line."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, f"\n{self.key} {step} {digest} {_END}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
