"""The backend's door: registry, truthful refusals, what is refused although supported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.registry import BACKENDS
from dpfa_core.spec import NoisePlan, Structure
from dpfa_kernels_torch import KeySource, TorchBackend

SCALE = 0.4


def test_registry_finds_the_backend_through_its_entry_point() -> None:
    backend = BACKENDS.create("torch")
    assert isinstance(backend, TorchBackend)
    assert (backend.contract_version, backend.name) == (1, "torch")
    assert backend.ops == {"release", "privatize", "training", "per_sample"}


def test_supported_problem_has_no_reasons(backend: TorchBackend, problem: Callable, plan: Callable) -> None:
    assert backend.supports("release", problem(clip_norm=1.0), plan()) == ()
    assert backend.supports("privatize", problem(clip_norm=1.0), plan()) == ()
    assert backend.supports("training", None, None) == ()


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "head_dim": ({"head_dim": 2049}, {}, "at most 2048 of column, got 2049"),
    "logit bound": ({"logit_bound": 351.0}, {}, "logit_bound must be at most 350"),
    "mps": ({"device": "mps:0"}, {}, "mps lacks"),
    "rank": (
        {},
        {"structure": Structure(kind="low_rank", parameters=(("rank", 6.0),), seed=1)},
        "needs the parameter 'rank', an integer from 1 to 5",
    ),
    "kept columns": (
        {},
        {"structure": Structure(kind="sparse", parameters=(), seed=1)},
        "needs the parameter 'kept', an integer from 1 to 5",
    ),
    "structure of another noise": (
        {},
        {"structure": Structure(kind="sparse", parameters=(("kept", 2.0),), seed=1), "distribution": "laplace"},
        "A structure shapes gaussian noise, got laplace",
    ),
    "discrete without a grid": ({}, {"distribution": "discrete_gaussian"}, "a power of two, got 0.0"),
    "discrete on a crooked grid": ({}, {"distribution": "discrete_gaussian", "grid": 0.1}, "a power of two, got 0.1"),
    "discrete on too fine a grid": ({}, {"distribution": "discrete_gaussian", "grid": 2.0**-50}, "below 2**46 grids"),
    "custom": ({}, {"distribution": "custom"}, "got custom by bm64"),
    "laplace from few bits": (
        {"dtype": "float16"},
        {"distribution": "laplace", "transform": "bm32"},
        "got laplace by bm32",
    ),
    "norm": ({}, {"norm": "whitened_l2"}, "A clip in whitened_l2 needs a block_diagonal structure"),
    "heads": ({}, {"head_scale": (1.0, 1.0)}, "head_scale must have 1 or 4 entries, got 2"),
    "rows": ({}, {"row_scale": (1.0, 1.0)}, "row_scale must have 1 or 10 entries, got 2"),
    "no clip": ({"clip_norm": None}, {}, "Noise without a clip_norm hides nothing"),
    "short tail": ({}, {"transform": "bm32"}, "float32 outputs show where a 32-bit sampler ends"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_is_a_reason_and_an_error(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, case: str
) -> None:
    fields, changes, text = REFUSED[case]
    shape, noisy = problem(**{"clip_norm": 1.0, **fields}), plan(**changes)
    reasons = backend.supports("release", shape, noisy)
    assert len(reasons) == 1
    assert text in reasons[0]
    with pytest.raises(PrivacyParameterError, match="the torch backend cannot run 'release' here"):
        backend.release(*inputs(shape), shape, noisy, None, KeySource().next_release(), softmax_scale=SCALE)


def test_unknown_operation_and_missing_plan_are_reasons(backend: TorchBackend, problem: Callable) -> None:
    assert "op must be one of" in backend.supports("dance", None, None)[0]
    assert backend.supports("release", problem(), None) == ("release needs a problem and a plan.",)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.double(), lambda x: x[..., :4]])
def test_tensors_that_do_not_fit_the_problem_are_refused(
    backend: TorchBackend,
    problem: Callable,
    inputs: Callable,
    noiseless: NoisePlan,
    position: int,
    change: Callable,
) -> None:
    tensors = list(inputs(problem()))
    tensors[position] = change(tensors[position])
    with pytest.raises(PrivacyParameterError, match=f"{'qkv'[position]} must be float32"):
        backend.release(*tensors, problem(), noiseless, None, None, softmax_scale=SCALE)


@pytest.mark.parametrize("purpose", ["training", "sampling", None])
def test_key_of_another_purpose_is_refused(
    backend: TorchBackend, problem: Callable, inputs: Callable, plan: Callable, purpose: str | None
) -> None:
    shape = problem(clip_norm=1.0)
    key = None if purpose is None else KeySource().key(purpose)
    with pytest.raises(PrivacyParameterError, match='must have the purpose "release"'):
        backend.release(*inputs(shape), shape, plan(), None, key, softmax_scale=SCALE)


def test_counter_layouts_are_exported(backend: TorchBackend) -> None:
    chacha = backend.counter_layout("release")
    assert backend.counter_layout("privatize") == chacha
    assert [term.stride for term in chacha.words[0]] == ["32*D32", "4*D32", "4", "1"]
    wide = backend.counter_layout("release", transform="bm64")
    assert [term.stride for term in wide.words[0]] == ["32*D16", "4*D16", "4", "1"]
    assert backend.counter_layout("training").fields[2] == ("element", 2**35)
    assert backend.counter_layout("training", generator="philox4x32-10").fields[2] == ("element", 2**33)
    for arguments in ({"op": "dance"}, {"op": "training", "transform": "bm32"}):
        with pytest.raises(PrivacyParameterError, match="must be one of"):
            backend.counter_layout(**arguments)


def test_what_is_saved_is_the_inputs_and_no_result(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    shape = problem()
    tensors = inputs(shape)
    _, saved = backend.release(*tensors, shape, noiseless, None, None, softmax_scale=SCALE)
    kept = [x for x in saved if isinstance(x, torch.Tensor)]
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in tensors]


def test_import_brings_neither_compilers_nor_models() -> None:
    code = (
        "import sys, dpfa_kernels_torch; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'triton', 'transformers', 'scipy', 'z3', 'dpfa_mechanisms', 'dpfa_accounting', 'dpfa_attention', "
        "'dpfa_training'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_bias_comes_with_a_biased_problem_and_fits_it(
    backend: TorchBackend, problem: Callable, inputs: Callable, noiseless: NoisePlan
) -> None:
    plain, biased = problem(), problem(biased=True)
    good = [torch.zeros(2, 4, 7, 9), torch.zeros(1, 1, 7, 9), torch.zeros(1, 4), torch.zeros(2, 4)]
    expected, _ = backend.release(*inputs(plain), plain, noiseless, None, None, softmax_scale=0.4)
    for bias in good:
        out, saved = backend.release(*inputs(plain), biased, noiseless, None, None, softmax_scale=0.4, bias=bias)
        assert torch.equal(out, expected)
        assert len(backend.release_backward(out, saved)) == 3
    bad = [torch.zeros(3, 4, 7, 9), torch.zeros(2, 2, 7, 9), torch.zeros(1, 1, 7, 1), torch.zeros(4), torch.zeros(2, 1)]
    for bias in (*bad, torch.zeros(1, 4, dtype=torch.int64)):
        with pytest.raises(PrivacyParameterError, match=r"bias must be floating-point \[2 or 1, 4 or 1, 7, 9\]"):
            backend.release(*inputs(plain), biased, noiseless, None, None, softmax_scale=0.4, bias=bias)
    for where, bias in ((plain, good[0]), (biased, None)):
        with pytest.raises(PrivacyParameterError, match="bias must come with a biased problem, and only then"):
            backend.release(*inputs(plain), where, noiseless, None, None, softmax_scale=0.4, bias=bias)
