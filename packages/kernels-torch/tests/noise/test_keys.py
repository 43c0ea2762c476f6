"""Key sources: no number twice, whatever threads and processes do; no key in any text."""

from __future__ import annotations

import copy
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch.noise.keys import KeySource

PURPOSES = ("release", "training", "sampling")


def test_operating_system_keys_are_chacha20_and_secure() -> None:
    key = KeySource().key("training")
    assert (key.generator, key.secure) == ("chacha20", True)
    assert key.words.dtype == torch.uint32
    assert key.words.shape == (8,)
    assert key.release.dtype == torch.uint64
    assert key.release.shape == (1,)


@pytest.mark.parametrize(("generator", "words"), [(None, 2), ("philox4x32-10", 2), ("chacha20", 8)])
def test_seeded_keys_repeat_and_are_marked_not_secure(generator: str | None, words: int) -> None:
    first, second = (KeySource(7, generator=generator).key("training") for _ in range(2))
    assert torch.equal(first.words, second.words)
    assert first.words.shape == (words,)
    assert not first.secure
    other = KeySource(8, generator=generator).key("training")
    assert not torch.equal(first.words, other.words)


def test_seeds_that_agree_in_32_bits_differ() -> None:
    assert not torch.equal(KeySource(1).key("release").words, KeySource(1 + 2**32).key("release").words)


def test_purposes_have_unrelated_keys() -> None:
    for source in (KeySource(), KeySource(1)):
        words = [tuple(source.key(purpose).words.tolist()) for purpose in PURPOSES]
        assert len(set(words)) == 3


def test_two_sources_differ() -> None:
    assert not torch.equal(KeySource().key("release").words, KeySource().key("release").words)


def test_release_numbers_never_repeat_over_threads() -> None:
    source = KeySource()
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: source.next_release().release.item(), range(2000)))
    assert sorted(numbers) == list(range(2000))


def test_releases_past_2_to_the_32_are_refused() -> None:
    source = KeySource()
    source._releases = 2**32 - 1
    assert source.next_release().release.item() == 2**32 - 1
    for _ in range(2):
        with pytest.raises(PrivacyParameterError, match=r"at most 2\*\*32 releases.*Make a new KeySource"):
            source.next_release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_draws_a_new_secret() -> None:
    source = KeySource()
    parent = source.next_release().words
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        key = source.next_release()
        os.write(writer, json.dumps([key.words.tolist(), key.release.item()]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    words, release = json.loads(os.read(reader, 4096))
    assert words != parent.tolist()
    assert release == 0
    assert torch.equal(source.next_release().words, parent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_of_a_seeded_source_is_refused() -> None:
    source = KeySource(3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            source.key("training")
        except PrivacyParameterError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert b"another seed" in os.read(reader, 4096)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copy_has_a_secret_of_its_own(duplicate: object) -> None:
    source = KeySource()
    assert not torch.equal(duplicate(source).key("release").words, source.key("release").words)
    with pytest.raises(PrivacyParameterError, match="cannot be copied"):
        duplicate(KeySource(5))


def test_keys_never_show_in_text() -> None:
    for source in (KeySource(), KeySource(1)):
        key = source.next_release()
        text = repr(source) + str(source) + repr(key) + str(key)
        assert not any(str(word) in text for word in key.words.tolist())
        assert source._master.hex() not in text
        assert repr(source._master) not in text


def test_philox_without_a_seed_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="only chacha20 can be keyed by the operating system"):
        KeySource(generator="philox4x32-10")


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(PrivacyParameterError, match="seed must be an integer >= 0"):
        KeySource(seed)


def test_release_numbers_are_for_releases() -> None:
    with pytest.raises(PrivacyParameterError, match="purpose of a release"):
        KeySource().next_release("training")
