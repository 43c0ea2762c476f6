"""Where keys come from: one secret per process, one key per purpose, one number per release."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Literal

import numpy as np
import torch

from dpfa_core.checks import integer, one_of, require
from dpfa_core.contracts import GENERATORS, PURPOSES, NoiseKey
from dpfa_core.keys import derive_key

MAX_RELEASES = 2**32

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A fork while another thread holds the lock would leave it held in the child for ever.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class KeySource:
    """A master secret, the keys derived from it, and the count of its releases.

    Without a seed the secret is drawn from the operating system, the generator is ChaCha20, and the keys
    are marked secure; a forked process or a copy draws a secret of its own. With a seed every run has the
    same noise, which anyone who knows the seed can subtract: the keys are marked not secure, and a fork or
    copy, which would repeat the noise, is refused.

    Guarantee: tested (no release number is given twice, over threads and forks; purposes differ).
    Args:
        seed: an integer >= 0 for reproducible noise, or None.
        generator: "chacha20" or "philox4x32-10"; by default Philox with a seed, ChaCha20 without.
    Raises: PrivacyParameterError for Philox without a seed, whose noise would look secure and is not.
    Source: PRIVACY P10.
    """

    def __init__(
        self, seed: int | None = None, *, generator: Literal["chacha20", "philox4x32-10"] | None = None
    ) -> None:
        if seed is not None:
            integer("seed", seed, least=0)
        chosen = generator or ("chacha20" if seed is None else "philox4x32-10")
        one_of("generator", chosen, GENERATORS)
        require(
            seed is not None or chosen == "chacha20",
            "only chacha20 can be keyed by the operating system",
            chosen,
            "Give a seed (not secure), or leave the generator out.",
        )
        self.secure = seed is None
        self._generator = chosen
        self._seed = seed
        self._draw()

    def key(self, purpose: Literal["release", "training", "sampling"], device: torch.device | str = "cpu") -> NoiseKey:
        """The key of `purpose`, whose counters the caller keeps (step, parameter, element)."""
        with _lock:
            return self._key(purpose, 0, device)

    def next_release(self, purpose: Literal["release"] = "release", device: torch.device | str = "cpu") -> NoiseKey:
        """The release key with a number that no other release has or will have.

        Raises: PrivacyParameterError after 2**32 releases.
        """
        one_of("purpose of a release", purpose, ("release",))
        with _lock:
            self._follow_fork()
            number = self._releases
            require(
                number < MAX_RELEASES,
                "one key serves at most 2**32 releases",
                number,
                "Make a new KeySource.",
            )
            self._releases = number + 1
            return self._key(purpose, number, device)

    def _key(self, purpose: str, release: int, device: torch.device | str) -> NoiseKey:
        self._follow_fork()
        one_of("purpose", purpose, PURPOSES)
        secret = derive_key(self._master, purpose)
        words = np.frombuffer(secret, dtype="<u4")[: 8 if self._generator == "chacha20" else 2]
        return NoiseKey(
            self._generator,
            purpose,
            words=torch.from_numpy(words.copy()).to(device),
            release=torch.tensor([release], dtype=torch.uint64).to(device),
            secure=self.secure,
        )

    def _follow_fork(self) -> None:
        if self._pid == os.getpid():
            return
        require(
            self.secure,
            "a seeded KeySource must stay in the process that made it",
            f"a fork of process {self._pid}",
            "Its noise would repeat: make a KeySource with another seed in the child.",
        )
        self._draw()

    def _draw(self) -> None:
        self._master = (
            os.urandom(32) if self._seed is None else hashlib.sha256(f"dpfa/seed/{self._seed}".encode()).digest()
        )
        self._releases = 0
        self._pid = os.getpid()

    def __reduce__(self) -> tuple[type[KeySource], tuple[()]]:
        require(
            self.secure,
            "a seeded KeySource cannot be copied or pickled",
            repr(self),
            "The copy would repeat its noise: make a KeySource with another seed.",
        )
        return KeySource, ()

    def __repr__(self) -> str:
        return f"KeySource(generator={self._generator!r}, secure={self.secure}, releases={self._releases})"
