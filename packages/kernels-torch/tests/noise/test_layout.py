"""Counter maps: injective, exactly the contract's, and what runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpfa_core.contracts import CounterLayout, NoiseKey
from dpfa_core.errors import PrivacyParameterError
from dpfa_kernels_torch import TorchBackend
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.discrete_noise import DISCRETE_LAYOUTS
from dpfa_kernels_torch.noise.layout import LAYOUTS, evaluate, release_counts
from dpfa_kernels_torch.noise.normal import bm32, bm64
from dpfa_kernels_torch.noise.philox import philox4x32
from dpfa_kernels_torch.noise.release_noise import release_noise
from dpfa_kernels_torch.noise.training_noise import add_training_noise_
from dpfa_kernels_torch.noise.words32 import from_uint32

RELEASES = [(generator, bits) for p, generator, bits in LAYOUTS if p == "release"]
GENERATORS = ["chacha20", "philox4x32-10"]


def grid(B: int, H: int, S: int, D: int, releases: int = 1) -> dict[str, torch.Tensor]:
    axes = torch.meshgrid(*(torch.arange(n) for n in (releases, B, H, S, D)), indexing="ij")
    return dict(zip(("release", "batch", "head", "row", "column"), axes, strict=True))


def counted(layout: CounterLayout, coordinates: dict[str, torch.Tensor], counts: dict[str, int]) -> int:
    words, lane = evaluate(layout, coordinates, counts)
    return len(torch.stack(torch.broadcast_tensors(*words, lane), -1).reshape(-1, 5).unique(dim=0))


@pytest.mark.parametrize(("generator", "transform"), RELEASES)
@pytest.mark.parametrize("S", [17, 33])
@pytest.mark.parametrize("D", [1, 24, 33, 40, 80])
def test_release_layout_is_injective(generator: str, transform: str, S: int, D: int) -> None:
    coordinates = grid(2, 3, S, D, releases=2)
    layout = LAYOUTS["release", generator, transform]
    assert counted(layout, coordinates, release_counts(3, D)) == 2 * 2 * 3 * S * D


@pytest.mark.parametrize("generator", GENERATORS)
def test_training_layout_is_injective(generator: str) -> None:
    axes = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(257), indexing="ij")
    coordinates = dict(zip(("parameter", "step", "element"), axes, strict=True))
    assert counted(LAYOUTS["training", generator, "bm64"], coordinates, {}) == 3 * 4 * 257


def test_the_exported_discrete_layouts_are_what_runs_and_are_injective(backend: TorchBackend) -> None:
    for generator, attempts in (("chacha20", 3), ("philox4x32-10", 12)):
        layout = backend.counter_layout("release", generator=generator, transform="discrete")
        assert layout is DISCRETE_LAYOUTS[generator]
        for S, D in ((17, 1), (5, 33), (3, 80)):
            axes = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 3, S, D, attempts)), indexing="ij")
            names = ("release", "batch", "head", "row", "column", "attempt")
            coordinates = dict(zip(names, axes, strict=True))
            words = torch.broadcast_tensors(*evaluate(layout, coordinates, {"H": 3, "D": D})[0])
            assert len(torch.stack(words, -1).reshape(-1, 4).unique(dim=0)) == axes[0].numel()
    with pytest.raises(PrivacyParameterError, match="must be one of"):
        backend.counter_layout("training", transform="discrete")


def blocks_used(generator: str, kind: str, release: int) -> torch.Tensor:
    """The counters [n, 4] of all blocks that one release takes from its key."""
    B, H, S, D = 2, 3, 19, 35
    c = grid(B, H, S, D)
    c["release"] = c["release"] + release
    if kind == "discrete":
        attempts = torch.arange(6)
        c = {name: axis[..., None] for name, axis in c.items()} | {"attempt": attempts}
        words, _ = evaluate(DISCRETE_LAYOUTS[generator], c, {"H": H, "D": D})
    else:
        words, _ = evaluate(LAYOUTS["release", generator, kind], c, release_counts(H, D))
    return torch.stack(torch.broadcast_tensors(*words), -1).reshape(-1, 4).unique(dim=0)


@pytest.mark.parametrize("generator", GENERATORS)
def test_releases_of_one_key_share_no_counter_whatever_noise_they_add(generator: str) -> None:
    kinds, numbers = ("bm32", "bm64", "discrete"), (0, 1, 2, 3, 2**16, 2**31, 2**32 - 3, 2**32 - 2, 2**32 - 1)
    used = [blocks_used(generator, kind, release) for kind, release in zip(3 * kinds, numbers, strict=True)]
    together = torch.cat(used)
    assert len(together.unique(dim=0)) == len(together)
    # it is the number of the release that keeps them apart: with one number, two kinds of noise would meet
    shared = torch.cat([blocks_used(generator, kind, 5) for kind in kinds])
    assert len(shared.unique(dim=0)) < len(shared)


def test_injectivity_check_sees_a_forgotten_row_bit() -> None:
    layout = LAYOUTS["release", "chacha20", "bm32"]
    short = CounterLayout(layout.fields, (layout.words[0][1:], *layout.words[1:]), layout.lane)
    coordinates = grid(1, 1, 17, 24)
    assert counted(short, coordinates, release_counts(1, 24)) < 17 * 24


@pytest.mark.parametrize(("generator", "transform"), RELEASES)
def test_words_of_one_block_are_used_once(generator: str, transform: str) -> None:
    """Two pairs of values never share a word: lanes stay within the block and pairs stay apart."""
    coordinates = grid(1, 2, 33, 40)
    words, lane = evaluate(LAYOUTS["release", generator, transform], coordinates, release_counts(2, 40))
    width = 2 if transform == "bm32" else 4
    block_size = 16 if generator == "chacha20" else 4
    first = lane & -width
    assert int(first.max()) + width <= block_size
    pair = torch.stack(torch.broadcast_tensors(*words, first), -1)[..., ::2, :].reshape(-1, 5)
    assert len(pair.unique(dim=0)) == len(pair)
    assert torch.equal(first[..., 0::2], first[..., 1::2])
    assert ((lane & 1) == coordinates["column"] % 2).all()


def test_release_layouts_are_those_of_the_contract() -> None:
    B, H, S, D = 2, 3, 40, 70
    c = grid(B, H, S, D, releases=2)
    b, h, r, col, rel = (c[name] for name in ("batch", "head", "row", "column", "release"))
    counts = release_counts(H, D)
    expected = {
        ("philox4x32-10", "bm32"): (
            (col >> 1, (r >> 4) * 8 + (r & 7), b * H + h, rel),
            2 * ((r >> 3) & 1) + (col & 1),
        ),
        ("philox4x32-10", "bm64"): ((col >> 1, r, b * H + h, rel), col & 1),
        ("chacha20", "bm32"): (
            (((r >> 4) * 8 + (r & 7)) * 4 * 3 + (col >> 5) * 4 + ((col >> 1) & 3), b * H + h, rel, 0 * rel),
            4 * ((col >> 3) & 3) + 2 * ((r >> 3) & 1) + (col & 1),
        ),
        ("chacha20", "bm64"): (
            (((r >> 4) * 8 + (r & 7)) * 4 * 5 + (col >> 4) * 4 + ((col >> 1) & 3), b * H + h, rel, 0 * rel),
            8 * ((col >> 3) & 1) + 4 * ((r >> 3) & 1) + (col & 1),
        ),
    }
    for (generator, transform), (words, lane) in expected.items():
        found_words, found_lane = evaluate(LAYOUTS["release", generator, transform], c, counts)
        assert torch.equal(found_lane, lane)
        for found, word in zip(found_words, words, strict=True):
            assert torch.equal(found.expand_as(word), word)


def test_training_layout_is_that_of_the_contract() -> None:
    e = torch.tensor([0, 1, 2, 7, 8, 2**35 - 1])
    coordinates = {"element": e, "parameter": torch.tensor(5), "step": torch.tensor(2**40 + 3)}
    words, lane = evaluate(LAYOUTS["training", "chacha20", "bm64"], coordinates, {})
    assert torch.equal(words[0], e >> 3)
    assert [int(word) for word in words[1:]] == [5, 3, 2**8]
    assert torch.equal(lane, 4 * ((e >> 1) & 3) + (e & 1))


@pytest.mark.parametrize(("generator", "transform"), RELEASES)
def test_release_noise_equals_counters_taken_one_by_one(
    generator: str,
    transform: str,
    release_key: Callable[..., NoiseKey],
    problem: Callable,
    plan: Callable,
) -> None:
    """The generator called for every value by itself at its counter, with no run and no gather."""
    B, H, S, D = 2, 3, 19, 35
    shape = problem(batch=B, q_len=S, kv_len=S, q_heads=H, kv_heads=H, head_dim=D)
    key = release_key(generator, release=2**32 - 1)
    noise = release_noise(shape, plan(transform=transform, head_scale=(1.0,)), key)
    c = {name: axis.flatten() for name, axis in grid(B, H, S, D).items()}
    c["release"] = c["release"] + 2**32 - 1
    words, lane = evaluate(LAYOUTS["release", generator, transform], c, release_counts(H, D))
    words = torch.broadcast_tensors(*words)
    blocks = (
        chacha20(from_uint32(key.words), words)
        if generator == "chacha20"
        else philox4x32(words, from_uint32(key.words))
    )
    width, function = (2, bm32) if transform == "bm32" else (4, bm64)
    picked = blocks.gather(-1, (lane & -width).unsqueeze(-1) + torch.arange(width))
    expected = function(picked).gather(-1, (lane & 1).unsqueeze(-1)).float()
    assert torch.equal(noise, expected.reshape(B, H, S, D).transpose(1, 2))


@pytest.mark.parametrize("generator", GENERATORS)
def test_training_noise_equals_counters_taken_one_by_one(generator: str, training_key: Callable[..., NoiseKey]) -> None:
    key = training_key(generator)
    first = 2**33 - 200
    noise = add_training_noise_(torch.zeros(150), 1.0, key, parameter=9, step=77, first_element=first)
    c = {
        "element": first + torch.arange(150),
        "parameter": torch.full((150,), 9),
        "step": torch.full((150,), 77),
    }
    words, lane = evaluate(LAYOUTS["training", generator, "bm64"], c, {})
    words = torch.broadcast_tensors(*words)
    blocks = (
        chacha20(from_uint32(key.words), words)
        if generator == "chacha20"
        else philox4x32(words, from_uint32(key.words))
    )
    picked = blocks.gather(-1, (lane & -4).unsqueeze(-1) + torch.arange(4))
    assert torch.equal(noise, bm64(picked).gather(-1, (lane & 1).unsqueeze(-1)).squeeze(-1).float())


@pytest.mark.parametrize(("name", "value"), [("release", 2**32), ("row", 2**24), ("head", -1)])
def test_coordinate_past_its_bound_is_refused(name: str, value: int) -> None:
    coordinates = grid(1, 1, 1, 1)
    coordinates[name] = torch.tensor([value])
    with pytest.raises(PrivacyParameterError, match=f"the noise counter's {name} must be in"):
        evaluate(LAYOUTS["release", "chacha20", "bm32"], coordinates, release_counts(1, 1))


def test_word_that_would_wrap_is_refused() -> None:
    coordinates = grid(1, 1, 1, 1)
    coordinates["batch"] = torch.tensor([2**20 - 1])
    with pytest.raises(PrivacyParameterError, match=r"must stay below 2\*\*32"):
        evaluate(LAYOUTS["release", "chacha20", "bm32"], coordinates, {"H": 2**13, "D32": 1})
