"""What private training asks of a backend: norms from above, clipped sums, and noise once per element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from dpfa_core.contracts import Backend, NoiseKey
from dpfa_core.errors import DPFAError
from dpfa_verification.conformance.bench import GENERATORS, Bench, flat
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.noise import NoiseExamination, check_injective
from dpfa_verification.conformance.obligation import Undecided, Violated, holds, obligation
from dpfa_verification.truth import counters, statistics
from dpfa_verification.truth.gradients import per_sample
from dpfa_verification.truth.normals import normals

KINDS = ("linear", "embedding", "scale", "shift", "bare")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIGHT = 1e-3
"""How far above the true squared norm a bound may lie on inputs without cancellation."""


class TrainingExamination:
    """The obligations of the operation "training"."""

    def __init__(self, backend: Backend, bench: Bench, level: Level) -> None:
        self.backend, self.bench, self.level = backend, bench, level

    def kinds(self) -> list[str]:
        found = []
        for kind in KINDS:
            try:
                self.backend.sqnorm(kind, self.saved(kind, torch.float32))
            except DPFAError:
                continue
            found.append(kind)
        if not found:
            raise Violated(f"sqnorm() refuses every kind of {KINDS}")
        return found

    def saved(self, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
        """Random inputs of one layer: odd sizes, repeated and padded tokens."""
        pick = self.bench.dice.choice
        batch, length = int(pick((1, 4))), int(pick((1, 7, 19)))
        width, out = int(pick((3, 8, 33))), int(pick((1, 5, 16)))
        g = self.bench.tensor((batch, length, out), dtype)
        match kind:
            case "linear":
                return self.bench.tensor((batch, length, width), dtype), g
            case "embedding":
                ids = torch.from_numpy(self.bench.dice.integers(0, 6, (batch, length))).to(self.bench.device)
                return ids, g, 6, pick((None, 2))
            case "scale":
                return self.bench.tensor((batch, length, out), dtype), g
            case "shift":
                return (g,)
        return (self.bench.tensor((batch, 3, out), dtype),)

    def cases(self) -> list[tuple[str, tuple[Any, ...], Tensor]]:
        """(kind, saved, exact per-sample gradients)."""
        found = []
        for kind in self.kinds():
            for number in range(max(3, self.level.shapes // 2)):
                saved = self.saved(kind, DTYPES[number % 3])
                found.append((kind, saved, self.true(kind, saved)))
        return found

    def true(self, kind: str, saved: tuple[Any, ...]) -> Tensor:
        return per_sample(kind, tuple(x.cpu() if isinstance(x, Tensor) else x for x in saved))

    def methods(self, kind: str, saved: tuple[Any, ...]) -> list[str]:
        found = ["auto"]
        for method in ("direct", "gram"):
            try:
                self.backend.sqnorm(kind, saved, method=method)
            except DPFAError:
                continue
            found.append(method)
        return found

    @obligation("sqnorm", "per-sample gradients in float64: a bound from above, and a tight one")
    def sqnorm(self) -> None:
        for kind, saved, gradients in self.cases():
            true = gradients.flatten(1).square().sum(1)
            for method in self.methods(kind, saved):
                bound = self.backend.sqnorm(kind, saved, method=method)
                holds(
                    bound.shape == true.shape and bound.dtype == torch.float32,
                    f"sqnorm({kind!r}) must be float32 {tuple(true.shape)}, it is {bound.dtype} {tuple(bound.shape)}",
                )
                found = bound.double().cpu()
                # True norms below the normal float32 numbers may round to 0.
                holds(
                    bool((found >= true * (1 - 2.0**-40)).all()),
                    f"sqnorm({kind!r}, method={method!r}) = {found.tolist()} is below {true.tolist()}",
                )
                holds(
                    bool((found <= true * (1 + TIGHT) + 1e-30).all()),
                    f"sqnorm({kind!r}, method={method!r}) = {found.tolist()} is far above {true.tolist()}",
                )

    @obligation("sqnorm_cancellation", "terms that cancel must not hide a gradient")
    def cancellation(self) -> None:
        """Large terms that almost cancel: the bound is still from above, and never NaN or negative."""
        for kind in self.kinds():
            for dtype in DTYPES:
                saved = self._cancelling(kind, dtype)
                true = self.true(kind, saved).flatten(1).square().sum(1)
                for method in self.methods(kind, saved):
                    found = self.backend.sqnorm(kind, saved, method=method).double().cpu()
                    holds(
                        bool((found >= true * (1 - 2.0**-40)).all()),
                        f"sqnorm({kind!r}, method={method!r}) of {dtype} terms that almost cancel is "
                        f"{found.tolist()}, the true values are {true.tolist()}",
                    )

    def _cancelling(self, kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
        """Each term is followed by its negative, a little off."""

        def doubled(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            x = self.bench.tensor(shape, torch.float64, 30.0)
            near = x * (1 + self.bench.tensor(shape, torch.float64, 2.0**-10))
            return torch.cat([x, x], dim=1).to(dtype), torch.cat([x, -near], dim=1).to(dtype)

        batch, length, width = 3, 40, 9
        same, opposed = doubled((batch, length, width))
        match kind:
            case "linear":
                return torch.cat([same, same], dim=2), opposed
            case "embedding":
                return torch.zeros(same.shape[:2], dtype=torch.int64, device=self.bench.device), opposed, 3, None
            case "scale":
                return torch.ones_like(same), opposed
        return (opposed,)

    @obligation("sqnorm_not_finite", "a sample that is not finite never gets a clip factor")
    def not_finite(self) -> None:
        for kind in self.kinds():
            for bad in (torch.nan, torch.inf):
                saved = self.saved(kind, torch.float32)
                place = 1 if kind == "embedding" else -1
                saved[place][0].view(-1)[0] = bad
                if kind == "embedding":
                    saved = (saved[0] * 0, *saved[1:3], None)
                found = float(self.backend.sqnorm(kind, saved)[0])
                holds(not found < math.inf, f"sqnorm({kind!r}) of a sample with {bad} is {found!r}, a finite number")

    @obligation("clipped_grad", "per-sample gradients in float64; PRIVACY P7: factors and sums in float32")
    def clipped_grad(self) -> None:
        for kind, saved, gradients in self.cases():
            factors = torch.from_numpy(self.bench.dice.uniform(0.1, 1.0, len(gradients))).float()
            found = self.backend.clipped_grad(kind, saved, factors.to(self.bench.device))
            weights = factors.double().reshape(-1, *[1] * (gradients.dim() - 1))
            expected = (weights * gradients).sum(0)
            holds(
                found.dtype == torch.float32 and found.shape == expected.shape,
                f"clipped_grad({kind!r}) must be float32 {tuple(expected.shape)}, it is {found.dtype} "
                f"{tuple(found.shape)}",
            )
            # Terms may cancel: the error of a float32 sum is a share of the sum of absolute terms.
            terms = self.true(kind, tuple(x.abs() if isinstance(x, Tensor) else x for x in saved))
            difference = float((found.double().cpu() - expected).norm())
            # A sample of nothing but padding has no terms at all.
            size = float((weights * terms).sum(0).norm()) + 1e-30
            holds(
                difference <= 3e-6 * size,
                f"clipped_grad({kind!r}) of {saved[1 if kind == 'embedding' else -1].dtype} inputs differs by "
                f"{difference / size:.2g} of the sum of absolute terms, allowed is 3e-6",
            )

    @obligation("clipped_grad_leaves_out", "factor 0 removes a sample, whatever its values")
    def leaves_out(self) -> None:
        for kind in self.kinds():
            saved: tuple[Any, ...] = ()
            while not saved or len(saved[0]) < 2:
                saved = self.saved(kind, torch.float32)
            factors = torch.full((len(saved[0]),), 0.5, device=self.bench.device)
            factors[0] = 0.0
            expected = (self.true(kind, saved)[1:] * 0.5).sum(0)
            saved[1 if kind == "embedding" else -1][0] = torch.nan
            found = self.backend.clipped_grad(kind, saved, factors).double().cpu()
            close = bool(torch.isfinite(found).all()) and float((found - expected).norm()) <= 1e-5 * (
                1 + float(expected.norm())
            )
            holds(close, f"clipped_grad({kind!r}) with factor 0 on a NaN sample does not equal the sum of the others")

    @obligation("per_sample_grad", "per-sample gradients in float64, and their weighted sum in place")
    def per_sample_grad(self) -> None:
        if "per_sample" not in self.backend.ops:
            raise Undecided("the backend does not offer the operation per_sample")
        for kind, saved, gradients in self.cases():
            factors = torch.from_numpy(self.bench.dice.uniform(0.1, 1.0, len(gradients))).float()
            factors = factors.to(self.bench.device)
            total = self.bench.tensor(tuple(gradients.shape[1:]))
            expected = total + self.backend.clipped_grad(kind, saved, factors)
            found = self.backend.add_clipped_grad_(total, kind, saved, factors)
            holds(found.data_ptr() == total.data_ptr(), f"add_clipped_grad_({kind!r}) must work in place")
            size = 1.0 + float(expected.abs().max())
            apart = float((found - expected).abs().max())
            holds(apart <= 1e-4 * size, f"add_clipped_grad_({kind!r}) is {apart:.2g} away from clipped_grad()")
            if kind != "linear":
                continue
            terms = self.true(kind, tuple(x.abs() if isinstance(x, Tensor) else x for x in saved))
            formed = self.backend.per_sample_grad(kind, saved)
            holds(
                formed.dtype == torch.float32 and formed.shape == gradients.shape,
                f"per_sample_grad({kind!r}) must be float32 {tuple(gradients.shape)}, it is {formed.dtype} "
                f"{tuple(formed.shape)}",
            )
            for sample in range(len(gradients)):
                difference = float((formed[sample].double().cpu() - gradients[sample]).norm())
                allowed = 3e-6 * (float(terms[sample].norm()) + 1e-30)
                holds(difference <= allowed, f"per_sample_grad({kind!r}) is {difference:.2g} away in sample {sample}")

    def generators(self) -> list[str]:
        found = []
        for generator in GENERATORS:
            try:
                self.noise(4, self.bench.key("training", generator))
            except DPFAError:
                continue
            found.append(generator)
        if not found:
            raise Violated("training keys of both generators are refused")
        return found

    def noise(
        self,
        elements: int,
        key: NoiseKey,
        *,
        std: float = 1.0,
        parameter: int = 3,
        step: int = 7,
        first_element: int = 0,
    ) -> Tensor:
        grad = torch.zeros(elements, device=self.bench.device)
        out = self.backend.add_noise_(grad, std, key, parameter=parameter, step=step, first_element=first_element)
        holds(out.data_ptr() == grad.data_ptr(), "add_noise_() must work in place and return its argument")
        return grad.double().cpu()

    @obligation("training_noise_law", "chi-square and Kolmogorov-Smirnov at 1e-6")
    def law(self) -> None:
        for generator in self.generators():
            values = flat(self.noise(self.level.values, self.bench.key("training", generator), std=0.02)) / 0.02
            off = statistics.standardised(values**2, 1.0, math.sqrt(2.0))
            told = f"{generator} training noise has {np.std(values):.5f} of its std, seed {self.bench.seed}"
            holds(abs(off) <= statistics.NORMAL_LIMIT, told)
            distance = statistics.kolmogorov(values, ndtr)
            holds(distance <= statistics.KS_LIMIT, f"{generator} training noise is not Gaussian (KS {distance:.2f})")
            repeated = statistics.repeated_pairs(values[: len(values) // 2 * 2].reshape(-1, 2))
            holds(repeated == 0, f"{repeated} pairs of {generator} training noise occur again")
            for lag in (1, 2, 3, 7, 8, 9, 16, 64):
                score = statistics.correlation(values[lag:], values[:-lag])
                holds(abs(score) <= statistics.NORMAL_LIMIT, f"{generator} training noise is related at lag {lag}")

    @obligation("training_noise_adds", "noise is added to the gradient; std 0 changes nothing")
    def adds(self) -> None:
        for generator in self.generators():
            key = self.bench.key("training", generator)
            grad = self.bench.tensor((3, 5, 7), scale=100.0)
            kept, noise = grad.clone(), self.noise(105, key).reshape(3, 5, 7)
            self.backend.add_noise_(grad, 0.0, key, parameter=3, step=7)
            holds(torch.equal(grad, kept), "std 0 changed the gradient")
            self.backend.add_noise_(grad, 1.0, key, parameter=3, step=7)
            difference = float((grad.double().cpu() - kept.double().cpu() - noise).abs().max())
            holds(difference <= 1e-4, f"gradient plus noise is {difference:.3g} away from the sum of both")

    @obligation("training_noise_shards", "PRIVACY P10: an element's noise depends on its index in the whole parameter")
    def shards(self) -> None:
        for generator in self.generators():
            key = self.bench.key("training", generator)
            whole = self.noise(97, key)
            for cut in (1, 2, 7, 8, 31, 64):
                first, second = self.noise(cut, key), self.noise(97 - cut, key, first_element=cut)
                holds(
                    torch.equal(torch.cat([first, second]), whole),
                    f"{generator} noise of two shards cut at element {cut} is not that of the whole",
                )

    @obligation("training_noise_fresh", "PRIVACY P10: key, parameter, step and place each change the noise")
    def fresh(self) -> None:
        for generator in self.generators():
            key = self.bench.key("training", generator)
            streams = {
                "the first": self.noise(4000, key),
                "another key": self.noise(4000, self.bench.key("training", generator)),
                "another parameter": self.noise(4000, key, parameter=4),
                "another step": self.noise(4000, key, step=8),
                "a step 2**32 later": self.noise(4000, key, step=7 + 2**32),
                "a far place": self.noise(4000, key, first_element=2**32),
                "step and parameter exchanged": self.noise(4000, key, parameter=7, step=3),
            }
            values = {name: flat(stream) for name, stream in streams.items()}
            for name, stream in list(values.items())[1:]:
                score = statistics.correlation(values["the first"], stream)
                same = statistics.repeated_pairs(np.concatenate([values["the first"], stream]).reshape(-1, 2))
                holds(
                    abs(score) <= statistics.NORMAL_LIMIT and same == 0,
                    f"{generator} training noise repeats under {name} (correlation {score:+.1f} standard "
                    f"deviations off, {same} pairs)",
                )
            again = self.noise(4000, key)
            holds(torch.equal(again, streams["the first"]), f"the same {generator} key gave different training noise")

    @obligation("training_noise_bits", "the published counter map of training noise, by an independent ChaCha20")
    def bits(self) -> None:
        """Noise is what key, parameter, step and element say."""
        layout_of = NoiseExamination(self.backend, self.bench, self.level, "training").layout
        undecided = []
        for generator in self.generators():
            layout = layout_of(generator, "bm64", "training")
            if layout is None and generator != "chacha20":
                undecided.append(generator)
                continue
            secret = self.bench.secret(generator)
            key = self.bench.key_of(secret, "training", generator)
            for parameter, step, first in ((0, 0, 0), (5, 2**33 + 9, 3), (2**32 - 1, 1, 2**32 - 50)):
                at = {
                    "element": first + np.arange(101),
                    "parameter": np.array([parameter]),
                    "step": np.array([step]),
                }
                published = counters.training_chacha(at) if generator == "chacha20" else None
                exported = counters.evaluate(layout, at, {}) if layout is not None else published
                if published is not None and exported is not None:
                    same = all(np.array_equal(a, b) for a, b in zip(published[0], exported[0], strict=True))
                    holds(same and np.array_equal(published[1], exported[1]), "the layout is not the published map")
                if exported is None:
                    raise Undecided("no layout")
                expected = normals(secret, generator, "bm64", exported)
                found = self.noise(101, key, parameter=parameter, step=step, first_element=first).numpy()
                wrong = np.flatnonzero(np.abs(found - expected) > 1e-5)
                holds(
                    not len(wrong),
                    f"{generator} noise of element {first + wrong[0]}, parameter {parameter}, step {step} is "
                    f"{found[wrong[0]]:.6g}, the specification says {expected[wrong[0]]:.6g}"
                    if len(wrong)
                    else "",
                )
        if undecided:
            raise Undecided(f"counter_layout() takes no generator, so {', '.join(undecided)} is unknown")

    @obligation("training_counter_injective", "enumeration of a small parameter over steps")
    def injective(self) -> None:
        layout_of = NoiseExamination(self.backend, self.bench, self.level, "training").layout
        for generator in GENERATORS:
            layout = layout_of(generator, "bm64", "training") or self.backend.counter_layout("training")
            grid = np.meshgrid(
                np.array([0, 1, 2**32 - 1]),
                np.array([0, 1, 2**32, 2**62]),
                np.concatenate([np.arange(300), 2**32 + np.arange(5)]),
                indexing="ij",
            )
            at = {name: axis.ravel() for name, axis in zip(("parameter", "step", "element"), grid, strict=True)}
            check_injective(f"{generator} training", layout, at, {})
