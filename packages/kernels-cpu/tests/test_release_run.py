"""Releases of the compiled library beside those of the torch backend, which is the truth."""

import ctypes
import dataclasses

import pytest
import torch

from dpfa_core.contracts import NoiseKey, PlanTensors
from dpfa_core.errors import PrivacyParameterError
from dpfa_core.spec import AttentionProblem, NoisePlan, Structure
from dpfa_kernels_cpu import CpuBackend, release_run
from dpfa_kernels_cpu.library import LEVELS, best_level, function
from dpfa_kernels_cpu.release_run import LAWS, SMALL, add_release_run_
from dpfa_kernels_torch import KeySource, TorchBackend
from dpfa_kernels_torch.noise import release_run as torch_run
from dpfa_kernels_torch.noise.chacha import chacha20
from dpfa_kernels_torch.noise.words32 import from_uint32

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 40, 2, 34), (3, 16, 2, 32), (2, 33, 4, 80), (1, 130, 1, 257)]
CPU = torch.device("cpu")


def key(release: int = 0, generator: str = "chacha20") -> NoiseKey:
    made = KeySource(3, generator=generator).key("release")
    return dataclasses.replace(made, release=torch.tensor([release], dtype=torch.uint64))


def noise(shape, law, dtype=torch.float32, scale=None, release=0, run=add_release_run_, **options):
    x = torch.zeros(shape, dtype=dtype)
    scale = torch.full((1, 1, 1), 1.7, dtype=torch.float64) if scale is None else scale
    run(x, scale.expand(shape[:3]), key(release), *law, **options)
    return x


def truth(*arguments, **options):
    return noise(*arguments, **options, run=torch_run.add_release_run_)


def levels() -> list[int]:
    return list(range(best_level() + 1))


def scales(shape):
    generator = torch.Generator().manual_seed(1)
    for sizes in ((1, 1, 1), (1, 1, shape[2]), (1, shape[1], 1), shape[:3]):
        yield torch.rand(sizes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("level", levels(), ids=lambda level: LEVELS[level])
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_that_of_torch(level, law, shape):
    for scale in scales(shape):
        found = noise(shape, law, scale=scale, release=2**32 - 3, level=level)
        assert torch.equal(found, truth(shape, law, scale=scale, release=2**32 - 3))
        exact = noise(shape, law, torch.float64, scale, level=level)
        torch.testing.assert_close(exact, truth(shape, law, torch.float64, scale), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_million_values_are_those_of_torch(law):
    shape = (2, 1024, 8, 64)
    found, expected = noise(shape, law), truth(shape, law)
    # where float64 values on either side of a float32 boundary differ in their last bit
    assert (found != expected).sum() <= 8
    torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("level", levels(), ids=lambda level: LEVELS[level])
@pytest.mark.parametrize(("first", "blocks"), [(0, 1), (3, 50), (2**32 - 21, 21)])
def test_the_words_are_those_of_the_cipher(level, first, blocks):
    """Bits and counters have no tolerance."""
    found = torch.empty(blocks, 16, dtype=torch.int32)
    stream = (5, 2**32 - 2, 7)
    secret = key().words.numpy().astype("<u4").tobytes()
    make = function("dpfa_key_stream")
    assert make(level, found.data_ptr(), blocks, secret, first, (ctypes.c_uint32 * 3)(*stream)) == 0
    numbers = torch.arange(first, first + blocks)
    expected = chacha20(from_uint32(key().words), (numbers, *(torch.tensor([word]) for word in stream)))
    assert torch.equal(from_uint32(found), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_instruction_set_gives_the_same_bits(law, dtype):
    first, *others = (noise((2, 67, 3, 72), law, dtype, level=level) for level in levels())
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_threads_add_the_same_noise(law):
    shape = (3, 70, 2, 40)
    assert torch.Size(shape).numel() > SMALL
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = noise(shape, law)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(noise(shape, law), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_noise_is_added_to_what_is_there_and_nothing_else(law):
    """Also where batch, rows, heads or even columns lie apart in memory."""
    shape = (2, 19, 3, 13)
    expected = noise(shape, law) + 5.0
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        around = torch.full([2 + shape[axis] for axis in order], 5.0)
        x = around[tuple(slice(1, -1) for _ in order)].permute(*(order.index(axis) for axis in range(4)))
        assert x.shape == shape
        scale = torch.full((1, 1, 1), 1.7, dtype=torch.float64).expand(shape[:3])
        add_release_run_(x, scale, key(), *law)
        assert torch.equal(x, expected)
        x.fill_(5.0)
        assert (around == 5.0).all()


def test_calls_differ_and_keys_repeat():
    shape, law = (2, 9, 3, 8), ("gaussian", "bm64")
    assert torch.equal(noise(shape, law, release=1), noise(shape, law, release=1))
    assert (noise(shape, law, release=1) != noise(shape, law, release=2)).all()


def test_a_counter_past_its_bound_is_refused():
    wide = torch.zeros(1, 1, 1, 2**11 + 1)
    with pytest.raises(PrivacyParameterError, match="column must be in"):
        add_release_run_(wide, torch.ones(1, 1, 1, dtype=torch.float64), key(), "gaussian", "bm64")
    with pytest.raises(PrivacyParameterError, match="release must be in"):
        noise((1, 1, 1, 1), ("gaussian", "bm64"), release=2**32)


def test_a_level_or_law_that_was_not_built_is_told():
    out, place = torch.zeros(8), ctypes.byref(release_run.Release())
    add = function("dpfa_add_release_f32")
    for level in (3, -1):
        assert add(level, 0, out.data_ptr(), place) == 1
    for law in (3, -1):
        assert add(0, law, out.data_ptr(), place) == 1
    assert (out == 0).all()


def problem(**fields) -> AttentionProblem:
    sizes = {"batch": 2, "q_len": 19, "kv_len": 19, "q_heads": 4, "kv_heads": 2, "head_dim": 10, "clip_norm": 1.0}
    return AttentionProblem(**sizes | fields)


def plan(**fields) -> NoisePlan:
    base = {"mechanism": "gaussian", "distribution": "gaussian", "head_scale": (0.3,), "transform": "bm64"}
    return NoisePlan(**base | fields)


def structured(kind, **parameters) -> NoisePlan:
    return plan(structure=Structure(kind=kind, parameters=tuple(parameters.items()), seed=1))


GENERATOR = torch.Generator().manual_seed(2)
BASIS = torch.linalg.qr(torch.randn(10, 3, generator=GENERATOR)).Q
PLANS = {
    "gaussian": (plan(), None),
    "heads": (plan(head_scale=(0.1, 0.2, 0.3, 0.4)), None),
    "rows": (plan(row_scale=tuple(0.1 + n / 9 for n in range(20))), None),
    "laplace": (plan(distribution="laplace", mechanism="laplace", norm="l1"), None),
    "discrete": (plan(distribution="discrete_gaussian", mechanism="discrete_gaussian", grid=2.0**-8), None),
    "low_rank": (structured("low_rank", rank=3.0), PlanTensors(project=BASIS, mix=BASIS)),
    "block_diagonal": (structured("block_diagonal"), PlanTensors(mix=torch.randn(10, 10, generator=GENERATOR))),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", PLANS)
def test_releases_are_those_of_torch(name, dtype):
    made, tensors = PLANS[name]
    if name in ("gaussian", "heads") and dtype in ("bfloat16", "float16"):
        made = dataclasses.replace(made, transform="bm32")
    asked = problem(dtype=dtype, causal=True, clip="output")
    q, k, v = (torch.randn(2, 19, heads, 10, generator=GENERATOR).to(getattr(torch, dtype)) for heads in (4, 2, 2))
    for backend in (CpuBackend(), TorchBackend()):
        assert backend.supports("release", asked, made) == ()
    for source in ("chacha20", "philox4x32-10"):
        outs = [
            backend.release(q, k, v, asked, made, tensors, key(5, source), softmax_scale=0.4)[0]
            for backend in (CpuBackend(), TorchBackend())
        ]
        torch.testing.assert_close(*outs, rtol=1e-12 if dtype == "float64" else 1e-6, atol=1e-7)
        assert dtype == "float64" or torch.equal(*outs)
        once, again = (
            backend.privatize_(outs[0].clone(), asked, made, tensors, key(6, source), clip_rows=True)
            for backend in (CpuBackend(), TorchBackend())
        )
        torch.testing.assert_close(once, again, rtol=1e-6, atol=1e-7)


def test_what_runs_elsewhere_is_left_to_others():
    there = problem(device="cuda:sm_90")
    assert any("run on the cpu" in reason for reason in CpuBackend().supports("release", there, plan()))
    with pytest.raises(PrivacyParameterError, match="the cpu backend cannot run 'privatize'"):
        CpuBackend().privatize_(torch.zeros(1), there, plan(), None, key(), clip_rows=False)
    assert CpuBackend().supports("training", None, None) == ()
