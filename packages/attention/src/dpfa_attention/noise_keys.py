"""Which key noises a release: the process's own secret, or that of a seed."""

from __future__ import annotations

import dataclasses
import os

import torch

from dpfa_core.checks import require
from dpfa_core.contracts import NoiseKey
from dpfa_kernels_torch.noise.keys import KeySource

# Kept for good: the release number of a seed goes on, so that two calls with one seed differ, and a script
# that runs again repeats both.
_sources: dict[int | None, KeySource] = {}


def release_key(seed: int | None, device: torch.device) -> NoiseKey:
    """The key of the next release; no other release of this process has its key and number.

    Guarantee: tested.
    Args: `seed` None draws the secret from the operating system; an integer >= 0 makes the noise of the
    n-th call with that seed the same in every process, and not secure.
    Raises: PrivacyParameterError for another seed, or a seed used before a fork, whose noise would repeat.
    """
    return _source(seed).next_release("release", device)


def key_of(seed: int | None, process: int, number: int, device: torch.device) -> NoiseKey:
    """The key that ``release_key`` gave out with `number`, again, on `device`.

    Raises: PrivacyParameterError in another process than the one that gave it out: its secret is another one.
    """
    require(process == os.getpid(), "a release must be computed in the process that drew its noise", process)
    release = torch.tensor([number], dtype=torch.uint64).to(device)
    return dataclasses.replace(_source(seed).key("release", device), release=release)


def _source(seed: int | None) -> KeySource:
    if seed not in _sources:
        # setdefault: of two threads that get here at once, both use the same one
        _sources.setdefault(seed, KeySource(seed))
    return _sources[seed]
