"""What the noise of a release must keep: its law, its scale, its bits, and that nothing is used twice."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from dpfa_core.contracts import Backend, CounterLayout, NoiseKey
from dpfa_core.errors import DPFAError
from dpfa_core.spec import AttentionProblem, NoisePlan
from dpfa_verification.conformance.bench import GENERATORS, NO_TENSORS, Bench, flat, plan
from dpfa_verification.conformance.level import Level
from dpfa_verification.conformance.obligation import Undecided, Violated, holds, obligation
from dpfa_verification.truth import counters, statistics
from dpfa_verification.truth.attention import visible
from dpfa_verification.truth.normals import normals

PROFILES = (("float32", "bm64"), ("bfloat16", "bm32"), ("float16", "bm32"))
LAPLACE_STD = math.sqrt(2.0)
ODD = {"batch": 2, "q_len": 35, "kv_len": 35, "q_heads": 3, "kv_heads": 3, "head_dim": 37}
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class NoiseExamination:
    """The obligations of the noise that "release" or "privatize" adds."""

    def __init__(self, backend: Backend, bench: Bench, level: Level, op: str) -> None:
        self.backend, self.bench, self.level, self.op = backend, bench, level, op

    def noise(self, problem: AttentionProblem, noise: NoisePlan, key: NoiseKey) -> Tensor:
        """The noise alone, as it leaves: what is released for values that are all zero."""
        shape = (problem.batch, problem.q_len, problem.q_heads, problem.head_dim)
        dtype = getattr(torch, problem.dtype)
        if self.op == "privatize":
            zeros = torch.zeros(shape, dtype=dtype, device=self.bench.device)
            return self.backend.privatize_(zeros, problem, noise, NO_TENSORS, key, clip_rows=True)
        q, k, v = self.bench.inputs(problem)
        out, _ = self.backend.release(
            q, k, torch.zeros_like(v), problem, noise, NO_TENSORS, key, softmax_scale=problem.head_dim**-0.5
        )
        return out

    def profiles(self, distribution: str = "gaussian") -> list[tuple[str, str]]:
        """The (dtype, transform) in which the backend adds this noise."""
        found = [
            (dtype, transform)
            for dtype, transform in (*PROFILES, ("bfloat16", "bm64"))
            if not self.backend.supports(
                self.op, self.bench.problem(dtype=dtype), plan(distribution=distribution, transform=transform)
            )
        ]
        if not found:
            raise Undecided(f"supports() has a reason against every {distribution} plan that was tried")
        return found

    def generators(self) -> list[str]:
        """The generators that the backend accepts keys of."""
        (dtype, transform), *_ = self.profiles()
        found = []
        for generator in GENERATORS:
            try:
                self.noise(
                    self.bench.problem(dtype=dtype), plan(transform=transform), self.bench.key(generator=generator)
                )
            except DPFAError:
                continue
            found.append(generator)
        if not found:
            raise Violated("keys of both generators are refused")
        return found

    def large(self, dtype: str, **fields: Any) -> AttentionProblem:
        """A problem whose releases hold enough values for a law, in few calls."""
        return self.bench.problem(
            batch=2, q_len=96, kv_len=2, q_heads=4, kv_heads=4, head_dim=72, dtype=dtype, **fields
        )

    def sample(self, problem: AttentionProblem, noise: NoisePlan, generator: str) -> Tensor:
        """At least level.values values of one key's consecutive releases: [release, B, S, H, D], float64."""
        secret = self.bench.secret(generator)
        numbers = problem.batch * problem.q_len * problem.q_heads * problem.head_dim
        releases = [
            self.noise(problem, noise, self.bench.key_of(secret, "release", generator, release)).double().cpu()
            for release in range(max(2, math.ceil(self.level.values / numbers)))
        ]
        return torch.stack(releases)

    @obligation("noise_law", "chi-square and Kolmogorov-Smirnov at 1e-6")
    def law(self) -> None:
        """Standardised noise is standard normal, in every profile."""
        for (dtype, transform), generator in itertools.product(self.profiles(), self.generators()):
            scale = 0.37
            values = self.sample(self.large(dtype), plan(transform=transform, head_scale=(scale,)), generator)
            self._is_normal(flat(values) / scale, f"{generator} {transform} noise in {dtype}")

    @obligation("laplace_law", "mean absolute value and Kolmogorov-Smirnov at 1e-6")
    def laplace_law(self) -> None:
        for (dtype, transform), generator in itertools.product(self.profiles("laplace"), self.generators()):
            noise = plan(distribution="laplace", transform=transform, head_scale=(0.37,), norm="l1")
            values = flat(self.sample(self.large(dtype), noise, generator)) / 0.37
            what = f"{generator} Laplace noise in {dtype}"
            off = statistics.standardised(np.abs(values), 1.0, 1.0)
            self._small(off, f"the mean absolute value of {what} is {np.mean(np.abs(values)):.5f}, not 1")
            distance = statistics.kolmogorov(values, statistics.laplace_distribution)
            holds(distance <= statistics.KS_LIMIT, self._told(f"{what} is not Laplace (KS {distance:.2f})"))

    def _is_normal(self, values: NDArray[np.float64], what: str) -> None:
        off = statistics.standardised(values**2, 1.0, math.sqrt(2.0))
        self._small(off, f"the standard deviation of {what} is {np.std(values):.5f} of the planned one")
        distance = statistics.kolmogorov(values, ndtr)
        holds(distance <= statistics.KS_LIMIT, self._told(f"{what} is not Gaussian (KS {distance:.2f})"))

    def _small(self, score: float, what: str) -> None:
        holds(abs(score) <= statistics.NORMAL_LIMIT, self._told(f"{what} ({score:+.1f} standard deviations off)"))

    def _told(self, text: str) -> str:
        return f"{text}, {self.op}, seed {self.bench.seed}"

    @obligation("noise_scale", "scale(row i, head h) = head_scale[h] * row_scale[keys visible to i]")
    def scale(self) -> None:
        (dtype, transform), *_ = self.profiles()
        problem = self.bench.problem(q_len=9, causal=True, dtype=dtype)
        heads = tuple(1.0 + head for head in range(problem.q_heads))
        rows = tuple(0.5 + n for n in range(problem.kv_len + 1))
        key = self.bench.key(generator=self.generators()[0])
        unit = self.noise(problem, plan(transform=transform), key).double().cpu()
        sees = visible(problem).sum(-1)
        for head_scale, row_scale in ((heads, (1.0,)), ((1.0,), rows), (heads, rows), ((2.5,), (3.0,))):
            noise = plan(transform=transform, head_scale=head_scale, row_scale=row_scale)
            if self.backend.supports(self.op, problem, noise):
                continue
            of_row = torch.tensor(row_scale).double()[sees if len(row_scale) > 1 else sees * 0]
            expected = unit * torch.tensor(head_scale).double().reshape(1, 1, -1, 1) * of_row[:, :, None, None]
            found = self.noise(problem, noise, key).double().cpu()
            wrong = (found - expected).abs() > 4 * ULP[dtype] * expected.abs()
            if wrong.any():
                b, i, h, c = (int(x) for x in wrong.nonzero()[0])
                raise Violated(
                    f"with head_scale {head_scale} and row_scale {row_scale} the noise of head {h} in row {i}, "
                    f"which sees {int(sees[b, i])} keys, is {float(found[b, i, h, c]):.6g}, not "
                    f"{float(expected[b, i, h, c]):.6g}"
                )

    @obligation("noise_repeats", "PRIVACY P10: the same key and counter give the same bits")
    def repeats(self) -> None:
        for (dtype, transform), generator in itertools.product(self.profiles(), self.generators()):
            key, problem = self.bench.key(generator=generator, release=5), self.bench.problem(dtype=dtype)
            first, second = (self.noise(problem, plan(transform=transform), key) for _ in range(2))
            holds(torch.equal(first, second), self._told(f"the same {generator} key gave different {transform} noise"))

    @obligation("noise_depends_on_key", "PRIVACY P10: fresh keys give fresh noise")
    def depends_on_key(self) -> None:
        self._fresh("another key", lambda generator: [self.bench.key(generator=generator) for _ in range(2)])
        for generator in self.generators():
            secret = self.bench.secret(generator)
            for word in range(len(secret)):
                changed = secret.copy()
                changed[word] ^= np.uint32(1 << int(self.bench.dice.integers(32)))
                keys = [self.bench.key_of(words, "release", generator) for words in (secret, changed)]
                self._unrelated(f"a {generator} key that differs in a bit of word {word}", keys)

    @obligation("noise_depends_on_release", "PRIVACY P10: no release repeats another one's noise")
    def depends_on_release(self) -> None:
        for generator in self.generators():
            secret = self.bench.secret(generator)
            for number in (1, 2**16, 2**31, 2**32 - 1):
                keys = [self.bench.key_of(secret, "release", generator, release) for release in (0, number)]
                self._unrelated(f"release {number} of the same key", keys)

    def _fresh(self, what: str, keys: Any) -> None:
        for generator in self.generators():
            self._unrelated(what, keys(generator))

    def _unrelated(self, what: str, keys: list[NoiseKey]) -> None:
        for dtype, transform in self.profiles()[:1]:
            problem = self.bench.problem(q_len=24, head_dim=24, dtype=dtype)
            first, second = (flat(self.noise(problem, plan(transform=transform), key)) for key in keys)
            self._uncorrelated(first, second, f"noise under {what} is related")
            pairs = np.concatenate([first, second]).reshape(-1, 2)
            if dtype == "float32":
                holds(statistics.repeated_pairs(pairs) == 0, self._told(f"noise under {what} repeats"))

    def _uncorrelated(self, left: NDArray[np.float64], right: NDArray[np.float64], what: str) -> None:
        for power, name in ((1, "correlation"), (2, "correlation of squares")):
            a, b = (x if power == 1 else (x**2 - 1) / LAPLACE_STD for x in (left, right))
            score = statistics.correlation(a, b)
            # Products of squares have heavy tails: for a few thousand of them 1e-6 lies further out.
            limit = statistics.NORMAL_LIMIT * (1 if power == 1 else 3)
            holds(abs(score) <= limit, self._told(f"{what} ({name} {score:+.1f} standard deviations off)"))

    @obligation("noise_used_once", "PRIVACY P10: no two elements share noise")
    def used_once(self) -> None:
        """No pair of values occurs twice over batch rows, heads, rows, columns and releases; no lag correlates."""
        for (dtype, transform), generator in itertools.product(self.profiles(), self.generators()):
            values = self.sample(self.large(dtype), plan(transform=transform), generator)
            for axis, name in enumerate(("release", "batch row", "row", "head", "column")):
                for lag in (1, 2, 7, 8, 16, 32):
                    if lag < values.shape[axis]:
                        left, right = (values.narrow(axis, start, values.shape[axis] - lag) for start in (0, lag))
                        self._uncorrelated(
                            flat(left),
                            flat(right),
                            f"{generator} {transform} noise is related at lag {lag} along {name}",
                        )
            if dtype == "float32":
                repeated = statistics.repeated_pairs(flat(values).reshape(-1, 2))
                holds(repeated == 0, self._told(f"{repeated} pairs of {generator} {transform} values occur again"))

    def layout(self, generator: str, transform: str, op: str) -> CounterLayout | None:
        """The exported layout of this generator and transform, None if the backend does not export it apart."""
        choose = {"generator": generator, "transform": transform}
        known = inspect.signature(self.backend.counter_layout).parameters
        if set(choose) <= set(known):
            return self.backend.counter_layout(op, **choose)  # type: ignore[call-arg]
        return None

    @obligation("noise_bits", "the published counter maps and transforms, by an independent Philox and ChaCha20")
    def bits(self) -> None:
        """Element by element, the noise is what key, coordinates, generator and transform say."""
        undecided: list[str] = []
        for (dtype, transform), generator in itertools.product(self.profiles(), self.generators()):
            layout = self.layout(generator, transform, self.op)
            if layout is None and transform == "bm64":
                undecided.append(f"{generator} {transform}")
                continue
            problem = self.bench.problem(**ODD, dtype=dtype)
            secret = self.bench.secret(generator)
            for release in (0, 3, 2**32 - 1):
                at = coordinates(problem, release)
                if layout is None:
                    found = counters.release_bm32(generator, at, problem.q_heads, problem.head_dim)
                else:
                    found = counters.evaluate(layout, at, counters.strides(problem.q_heads, problem.head_dim))
                expected = 0.37 * normals(secret, generator, transform, found)
                key = self.bench.key_of(secret, "release", generator, release)
                noise = self.noise(problem, plan(transform=transform, head_scale=(0.37,)), key).double().cpu().numpy()
                wrong = np.abs(noise - expected) > 1e-5 * 0.37 + ULP[dtype] * np.abs(expected)
                if wrong.any():
                    b, i, h, c = (int(x) for x in np.argwhere(wrong)[0])
                    raise Violated(
                        f"{generator} {transform} noise of release {release} at batch row {b}, row {i}, head {h}, "
                        f"column {c} is {noise[b, i, h, c]:.6g}, the specification says {expected[b, i, h, c]:.6g}"
                    )
        if undecided:
            raise Undecided(f"counter_layout() takes no generator and transform, so {', '.join(undecided)} is unknown")

    @obligation("counter_map", "the published map of the 32-bit profile")
    def counter_map(self) -> None:
        """The exported layout is the published one."""
        exported = [(generator, self.layout(generator, "bm32", self.op)) for generator in GENERATORS]
        if exported[0][1] is None:
            exported = [(generator, self.backend.counter_layout(self.op)) for generator in GENERATORS]
            holds(any(self._published(*pair) for pair in exported), "counter_layout() is neither published map")
            return
        for generator, layout in exported:
            holds(self._published(generator, layout), f"the {generator} layout is not the published map")

    def _published(self, generator: str, layout: CounterLayout | None) -> bool:
        if layout is None:
            return False
        dice = self.bench.dice
        heads, columns = 12, 200
        at = {
            name: dice.integers(0, bound, 4000)
            for name, bound in (
                ("batch", 999),
                ("head", heads),
                ("row", 2**18),
                ("column", columns),
                ("release", 2**32),
            )
        }
        found, lane = counters.evaluate(layout, at, counters.strides(heads, columns))
        words, published = counters.release_bm32(generator, at, heads, columns)
        return len(found) == 4 and np.array_equal(np.array([*found, lane]), np.array([*words, published]))

    @obligation("counter_injective", "enumeration at odd sizes, and no word wraps at the largest")
    def injective(self) -> None:
        layouts = [
            (f"{generator} {transform}", self.layout(generator, transform, self.op))
            for generator, transform in itertools.product(GENERATORS, ("bm32", "bm64"))
        ]
        if layouts[0][1] is None:
            layouts = [("the", self.backend.counter_layout(self.op))]
        for name, layout in layouts:
            if layout is not None:
                names = counters.strides(ODD["q_heads"], ODD["head_dim"])
                at = [coordinates(self.bench.problem(**ODD), release) for release in (0, 1, 2**31)]
                joined = {
                    field: np.concatenate([np.broadcast_arrays(*x.values(), x[field])[-1].ravel() for x in at])
                    for field in at[0]
                }
                check_injective(name, layout, joined, names)
                bounds = dict(layout.fields)
                check_no_wrap(name, layout, counters.strides(bounds["head"], bounds["column"]))


def coordinates(problem: AttentionProblem, release: int) -> dict[str, NDArray[np.int64]]:
    """The coordinates of every element of a release, broadcastable to [B, S, H, D]."""
    sizes = (problem.batch, problem.q_len, problem.q_heads, problem.head_dim)
    names = ("batch", "row", "head", "column")
    open_grid = np.ogrid[tuple(slice(size) for size in sizes)]
    return dict(zip(names, (axis.astype(np.int64) for axis in open_grid), strict=True)) | {
        "release": np.full((1, 1, 1, 1), release, dtype=np.int64)
    }


def check_injective(name: str, layout: CounterLayout, at: dict[str, NDArray[np.int64]], names: dict[str, int]) -> None:
    """No two coordinates share counter and lane."""
    words, lane = counters.evaluate(layout, at, names)
    rows = np.stack(np.broadcast_arrays(*words, lane), axis=-1).reshape(-1, len(words) + 1)
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    if (counts > 1).any():
        index = int(first[np.argmax(counts > 1)])
        same = np.flatnonzero((rows == rows[index]).all(axis=1))[:2]
        told = [{field: int(values[place]) for field, values in at.items()} for place in same]
        raise Violated(f"{name} layout gives {told[0]} and {told[1]} the same counter and lane {rows[index].tolist()}")


def check_no_wrap(name: str, layout: CounterLayout, names: dict[str, int]) -> None:
    """Every counter word fits 32 bits while the fields stay below their bounds."""
    for place, most in enumerate(counters.largest_words(layout, names)):
        holds(most < 2**32, f"word {place} of the {name} layout reaches {most} within the bounds {layout.fields}")
