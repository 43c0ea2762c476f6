"""Every way of clipping: one sample's whole contribution stays within max_grad_norm, and equals a plain reference."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyText, TinyViT, exact_gradients, images, per_sample_loss, texts

from dpfa_core.errors import PrivacyParameterError
from dpfa_core.events import Gaussian, PoissonSampled
from dpfa_training import QuantileClipping, TrainingPlan, clipped_gradients, engine_of, make_private
from dpfa_training.clipping import ROUNDING, SHRINK, Clipping
from dpfa_training.threshold_groups import clipping_for


class TinyHeads(nn.Module):
    """torch's own attention, and a hand-written one whose keys have fewer heads than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 12)
        self.torchs = nn.MultiheadAttention(12, 3, batch_first=True)
        self.own = TinyProjections()
        self.head = nn.Linear(12, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images.reshape(len(images), 16, 4))
        x = x + self.torchs(x, x, x, need_weights=False)[0]
        return self.head(self.own(x).mean(1))


class TinyProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.q_proj, self.o_proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k_proj, self.v_proj = nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 3)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def head_of(name: str, row: int, column: int) -> str:
    """The group of one element under "per_head", written down element by element."""
    match name.split("."):
        case ["torchs", "in_proj_weight" | "in_proj_bias"]:
            return f"torchs {row % 12 // 4}"
        case ["torchs", "out_proj", "weight"]:
            return f"torchs {column // 4}"
        case ["own", "q_proj", _]:
            return f"own {row // 3}"
        case ["own", "k_proj" | "v_proj", _]:
            return f"own {row // 3 * 2}"
        case ["own", "o_proj", "weight"]:
            return f"own {column // 3}"
    return name.rpartition(".")[0]


CASES = {"vit": (TinyViT, images), "text": (TinyText, texts), "heads": (TinyHeads, images)}
PREFIXES = {
    "vit": {"": 0.3, "head": 0.2, "qkv.weight": 0.1},
    "text": {"": 0.3, "words": 0.2, "mix.weight": 0.1},
    "heads": {"": 0.3, "torchs": 0.2, "torchs.out_proj": 0.1},
}
CHOICES = ("flat", "automatic", "per_layer", "per_head", "given")
CHECKED = [(case, choice) for case in CASES for choice in CHOICES if choice != "per_head" or case == "heads"]


def clipping_of(case, choice):
    return PREFIXES[case] if choice == "given" else choice


def reference(module, batch, case, choice, bound):
    """Summed clipped gradients, one sample and one element's group at a time, in float64."""
    names = [name for name, _ in module.named_parameters()]
    if choice == "given":
        prefixes = sorted(PREFIXES[case], key=len)
        label = {n: [p for p in prefixes if n.startswith(p)][-1] for n in names}
    else:
        label = {n: "" if choice in ("flat", "automatic") else n.rpartition(".")[0] for n in names}
    masks = {}
    for name, parameter in module.named_parameters():
        matrix = parameter.reshape(parameter.shape[0], -1)
        for row in range(matrix.shape[0]):
            for column in range(matrix.shape[1]):
                group = head_of(name, row, column) if choice == "per_head" else label[name]
                empty = torch.zeros_like(matrix, dtype=torch.float64)
                masks.setdefault((group, name), empty)[row, column] = 1.0
    groups = sorted({group for group, _ in masks})
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
    for sample in exact_gradients(module, batch):
        for group in groups:
            own = {n: m.reshape(sample[n].shape) * sample[n] for (g, n), m in masks.items() if g == group}
            norm = math.sqrt(sum(float(part.square().sum()) for part in own.values()))
            limit = PREFIXES[case][group] if choice == "given" else bound / math.sqrt(len(groups))
            factor = limit / (norm + SHRINK) if choice == "automatic" else min(1.0, limit / norm) if norm else 0.0
            for name, part in own.items():
                total[name] += factor * part
    return total


@pytest.mark.parametrize(("case", "choice"), CHECKED)
def test_clipped_sum_equals_a_plain_reference(case, choice):
    torch.manual_seed(2)
    build, data = CASES[case]
    module, batch = build(), data(3)
    sums, _ = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=0.4, clipping=clipping_of(case, choice))
    truth = reference(module, batch, case, choice, 0.4)
    error = sum(float((sums[n].double() - truth[n]).square().sum()) for n in truth)
    assert math.sqrt(error / sum(float(t.square().sum()) for t in truth.values())) <= 1e-5


@pytest.mark.parametrize(("case", "choice"), CHECKED)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_one_sample_never_adds_more_than_max_grad_norm(case, choice, scale):
    torch.manual_seed(3)
    build, data = CASES[case]
    module = build()

    def losses(model, batch):
        return scale * per_sample_loss(model, batch)

    for seed in range(4):
        options = {"max_grad_norm": 0.375, "clipping": clipping_of(case, choice)}
        sums, _ = clipped_gradients(module, losses, data(1, seed), **options)
        norm = math.sqrt(math.fsum(float(value.double().square().sum()) for value in sums.values()))
        assert norm <= 0.375
        if scale == 1e6 and choice in ("flat", "automatic"):
            assert norm >= 0.375 * (1 - 1e-5)


@pytest.mark.parametrize("rule", ["abadi", "automatic"])
def test_a_factor_and_its_product_stay_below_the_threshold_after_rounding_to_float32(rule):
    gradients = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 20 + 0.5
    thresholds = (0.1, 0.5, 1.0)
    factors = Clipping(thresholds, rule=rule).factors(gradients.double().expand(3, -1)).float()
    for threshold, own in zip(thresholds, factors, strict=True):
        assert float((own * gradients).double().max()) <= threshold


@pytest.mark.parametrize("bound", [0.1, 1.0, 1 / 3, 7e-12, 1e30])
def test_thresholds_of_all_groups_stay_within_max_grad_norm_exactly(bound):
    for choice in ("per_layer", "per_head", "flat"):
        thresholds = clipping_for(choice, bound, TinyHeads()).thresholds
        square, limit = sum(Fraction(t) ** 2 for t in thresholds), Fraction(bound) ** 2
        assert limit * (1 - Fraction(1, 2**30)) <= square <= limit
    assert clipping_for((("", 0.3), ("head", 0.4)), 0.5, TinyHeads()).thresholds[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("clipping", "message"),
    [
        ({"head": 0.1}, "none for 'embed.weight'"),
        ({"": 0.1, "haed": 0.1}, "'haed', which leads to none"),
        ({"": 0.4, "head": 0.4}, "must stay within max_grad_norm=0.5 together"),
        ({"": -1.0}, "must be a finite number > 0"),
        ({}, "at least one group"),
        ("layerwise", "must be one of 'flat', 'per_layer'"),
        (3, "must be a name"),
    ],
)
def test_clipping_that_leaves_something_open_is_refused(clipping, message):
    with pytest.raises(PrivacyParameterError, match=message):
        private(TinyHeads(), clipping=clipping)


def test_per_head_without_a_head_count_is_refused():
    with pytest.raises(PrivacyParameterError, match="tell their head count"):
        private(TinyViT(), clipping="per_head")


def private(module, data=None, **options):
    defaults = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 3}
    return make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(*(data or images(20))), batch_size=5),
        **defaults | options,
    )


@pytest.mark.parametrize("clipping", ["per_layer", {"": 0.4, "head": 0.3}, QuantileClipping(), "automatic"])
def test_plans_come_back_from_json_whatever_the_clipping(clipping):
    plan = TrainingPlan(
        noise_multiplier=1.0, max_grad_norm=0.5, population=100, expected_batch_size=10, clipping=clipping
    )
    assert TrainingPlan.from_json(plan.to_json()) == plan
    assert hash(plan) == hash(TrainingPlan.from_json(plan.to_json()))
    assert plan.event() == PoissonSampled(0.1, Gaussian(1.0))


def noiseless_moves(clipping, data, **options):
    """By how much each step of the plain loop, with its scalar loss, moves the weights; C at that step; rows."""
    torch.manual_seed(0)
    module, opt, loader = private(TinyHeads(), data, noise_multiplier=0, clipping=clipping, **options)
    engine, moves, rows = engine_of(module), [], 0
    for x, y in loader:
        before, bound, steps = [p.detach().clone() for p in module.parameters()], engine.clip_norm, engine.steps
        (1e4 * nn.functional.cross_entropy(module(x), y)).backward()
        rows += int(engine._batch.weights.sum())
        opt.step()
        if engine.steps > steps:
            after = zip(before, module.parameters(), strict=True)
            moved = math.sqrt(sum(float((a - b.detach()).double().square().sum()) for a, b in after))
            moves.append((moved * engine.plan.expected_batch_size, bound, rows))
            rows = 0
    return moves


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer", "per_head", QuantileClipping(learning_rate=2)])
@pytest.mark.parametrize("size", [None, 2])
def test_fault_1_a_scalar_loss_is_clipped_sample_by_sample(clipping, size):
    for moved, bound, rows in noiseless_moves(clipping, images(20), max_grad_norm=1e-3, max_physical_batch_size=size):
        assert moved <= rows * bound * (1 + 1e-4) + 1e-5  # the weights themselves are rounded
        assert rows == 0 or moved > 0


def test_fault_10_noise_is_calibrated_for_all_groups_together_and_no_layer_goes_without():
    with pytest.raises(PrivacyParameterError, match="together, got sqrt"):
        private(TinyHeads(), clipping={"": 0.5, "head": 0.5, "embed": 0.5})
    module = TinyHeads()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module, opt, loader = private(module, noise_multiplier=50.0, max_grad_norm=1e-3, clipping="per_layer")
    x, y = next(iter(loader))
    nn.functional.cross_entropy(module(x), y).backward()
    opt.step()
    for name, parameter in module.named_parameters():
        drawn = parameter.detach().double().flatten() * 5 / (50.0 * 1e-3)
        spread = math.sqrt(2 / len(drawn))
        assert abs(float(drawn.square().mean()) - 1) < 5 * spread, name


def test_fault_10_one_sample_at_the_threshold_of_every_layer_moves_the_sum_by_max_grad_norm_at_most():
    def losses(model, batch):
        return 1e5 * per_sample_loss(model, batch)

    module, batch = TinyHeads(), images(1)
    sums, _ = clipped_gradients(module, losses, batch, max_grad_norm=1.0, clipping="per_layer")
    layers = {name.rpartition(".")[0] for name in sums}
    for layer in layers:
        own = [value for name, value in sums.items() if name.rpartition(".")[0] == layer]
        square = sum(float(value.double().square().sum()) for value in own)
        assert math.sqrt(square) == pytest.approx(ROUNDING / math.sqrt(len(layers)), rel=1e-4)
    assert sum(float(value.double().square().sum()) for value in sums.values()) <= 1.0


@pytest.mark.parametrize("clipping", ["automatic", "per_layer", "per_head", PREFIXES["heads"]])
def test_parts_of_a_draw_add_up_to_the_whole_draw(clipping):
    ends = []
    for size in (None, 2):
        torch.manual_seed(0)
        module, opt, loader = private(TinyHeads(), clipping=clipping, max_physical_batch_size=size)
        for x, y in loader:
            nn.functional.cross_entropy(module(x), y).backward()
            opt.step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
