"""Which key noises a release: the process's own secret, or that of a seed."""

from __future__ import annotations

import torch

from dpfa_core.checks import integer
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
    if seed is not None:
        integer("seed", seed, least=0, remedy="None draws a secret from the operating system.")
    if seed not in _sources:
        # setdefault: of two threads that get here at once, both use the same one
        _sources.setdefault(seed, KeySource(seed))
    return _sources[seed].next_release("release", device)
