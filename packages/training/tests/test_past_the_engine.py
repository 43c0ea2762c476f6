"""Ways past clip and noise that a loop may take by accident: each is refused before anything moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpfa_core.errors import NotPrivateError
from dpfa_training import clipped_gradients, engine_of, make_private

torch.manual_seed(0)
DATA = torch.randn(24, 4), torch.randint(0, 3, (24,))


class Net(nn.Module):
    """Keeps what its forward does not return: a hidden state, and a balance of the batch as experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.hidden = torch.tanh(self.first(x))
        self.balance = self.hidden.softmax(-1).mean(0).square().sum()
        return self.last(self.hidden)


class OwnLoss(Net):
    """A model in the style of transformers."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = super().forward(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


def private(module: nn.Module, **options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    return make_private(
        module=module,
        optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(*DATA), batch_size=8),
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "seed": 1} | options,
    )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, loss: Callable[..., Tensor]) -> None:
    for x, y in loader:
        loss(module, x, y).backward()
        optimizer.step()


def plain(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


# ---- what the loss depends on

OUTSIDE = nn.Linear(3, 3)
BEFORE = nn.Linear(4, 4)
LOSSES: dict[str, tuple[type[Net], Callable[..., Tensor], str]] = {
    "a balance that the module keeps": (
        Net,
        lambda m, x, y: plain(m, x, y) + m.balance,
        "a tensor that it does not return",
    ),
    "a root of what it keeps": (
        Net,
        lambda m, x, y: plain(m, x, y) + m.hidden.square().mean().sqrt(),
        "a tensor that it does not return",
    ),
    "what it keeps alone": (
        Net,
        lambda m, x, y: 0 * m(x).detach().sum() + m.hidden.square().sum(1).mean(),
        "a tensor that it does not return",
    ),
    "a balance beside the module's own loss": (
        OwnLoss,
        lambda m, x, y: m(x, y)["loss"] + m.balance,
        "a tensor that it does not return",
    ),
    "a layer behind the module": (
        Net,
        lambda m, x, y: F.cross_entropy(OUTSIDE(m(x)), y),
        r"no trainable tensors of its own, got one of shape \(3, 3\)",
    ),
    "a layer behind a module with its own loss": (
        OwnLoss,
        lambda m, x, y: F.cross_entropy(OUTSIDE(m(x, y)["logits"]), y),
        r"no trainable tensors of its own, got one of shape \(3, 3\)",
    ),
    "a layer before the module": (
        Net,
        lambda m, x, y: plain(m, BEFORE(x), y),
        r"must get data, got a tensor of shape .* computed with gradients",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_would_be_trained_or_coupled_past_the_modules_output_is_refused(name: str) -> None:
    build, loss, text = LOSSES[name]
    module, optimizer, loader = private(build())
    with pytest.raises(NotPrivateError, match=text):
        train(module, optimizer, loader, loss)
    assert engine_of(module).steps == 0
    assert not list(engine_of(module).ledger.events())


HARMLESS: dict[str, tuple[type[Net], Callable[..., Tensor]]] = {
    "a frozen layer behind": (Net, lambda m, x, y: F.cross_entropy(F.linear(m(x), OUTSIDE.weight.detach()), y)),
    "a frozen layer before": (Net, lambda m, x, y: plain(m, BEFORE(x).detach(), y)),
    "an input with a gradient of its own": (Net, lambda m, x, y: plain(m, x.requires_grad_(), y)),
    "own loss": (OwnLoss, lambda m, x, y: m(x, y)["loss"]),
    "own loss of such an input": (OwnLoss, lambda m, x, y: m(x.requires_grad_(), y)["loss"]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_trained_may_be_there(name: str) -> None:
    build, loss = HARMLESS[name]
    module, optimizer, loader = private(build())
    train(module, optimizer, loader, loss)
    assert engine_of(module).steps == 3


# ---- which parameters there are


def frozen_first() -> Net:
    module = Net()
    module.first.requires_grad_(False)
    return module


def replace(module: Any) -> None:
    module.last.weight = nn.Parameter(torch.zeros(3, 8))


CHANGES: dict[str, tuple[Callable[[], Net], Callable[[Any], object], str]] = {
    "added": (Net, lambda m: m.add_module("late", nn.Linear(3, 3)), r"\['late\.weight', 'late\.bias'\] besides them"),
    "unfrozen": (frozen_first, lambda m: m.first.requires_grad_(), r"\['first\.weight', 'first\.bias'\] besides them"),
    "replaced": (Net, replace, r"\['last\.weight'\] besides them"),
    "frozen": (Net, lambda m: m.first.requires_grad_(False), r"all but \['first\.weight', 'first\.bias'\]"),
    "cast": (Net, lambda m: m.bfloat16(), r"'first\.weight' in torch\.bfloat16"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("taken", [0, 1])
def test_parameters_that_change_after_make_private_are_refused_by_name(name: str, taken: int) -> None:
    build, change, text = CHANGES[name]
    module, optimizer, loader = private(build())
    batches = iter(loader)
    for _ in range(taken):
        x, y = next(batches)
        plain(module, x, y).backward()
        optimizer.step()
    change(module)
    x, y = next(batches)
    with pytest.raises(NotPrivateError, match=rf"{text}.*detach\(\), change the module"):
        plain(module, x.to(module.last.weight.dtype), y)
    if name == "replaced":
        assert not module.last.weight.any()  # the module is left as its owner made it


def test_the_remedy_for_changed_parameters_works() -> None:
    module, optimizer, loader = private(frozen_first())
    train(module, optimizer, loader, plain)
    engine = engine_of(module)
    engine.detach()
    module.first.requires_grad_()
    module, optimizer, loader = private(module, ledger=engine.ledger, seed=2)
    train(module, optimizer, loader, plain)
    assert sum(count for _, count in engine.ledger.events()) == 6


def test_an_optimiser_that_holds_more_later_is_refused_at_its_step() -> None:
    module, optimizer, loader = private(Net())
    x, y = next(iter(loader))
    plain(module, x, y).backward()
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra]})
    before = module.last.weight.detach().clone()
    with pytest.raises(NotPrivateError, match="trainable parameters and nothing else, got 5"):
        optimizer.step()
    assert torch.equal(module.last.weight, before)


def move(parameter: Tensor) -> None:
    """An optimiser of one's own, run during backward."""
    with torch.no_grad():
        parameter -= parameter.grad


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_are_refused_before_they_see_a_gradient(kind: str) -> None:
    module, seen = Net(), []
    hook = move if "accumulate" in kind else seen.append
    getattr(module.last.weight, kind)(hook)
    before = module.last.weight.detach().clone()
    module, _, loader = private(module)
    with pytest.raises(NotPrivateError, match=r"'last\.weight' must have no gradient hooks"):
        module(next(iter(loader))[0])
    assert not seen
    assert torch.equal(module.last.weight, before)


# ---- what leaves with the weights


class Tracking(Net):
    """Follows the mean of its inputs, as running statistics do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(4), persistent=how != "not saved")
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        mean = x.detach().mean(0)
        if self.training:
            self.calls += 1
            match self.how:
                case "in place" | "not saved":
                    self.mean.lerp_(mean, 0.1)
                case "by its data":
                    self.mean.data.copy_(mean)
                case "replaced":
                    self.mean = mean
        return super().forward(x)


@pytest.mark.parametrize("how", ["in place", "by its data", "replaced"])
@pytest.mark.parametrize("graded", [True, False])
def test_a_buffer_that_follows_the_data_is_refused_by_name_and_put_back(how: str, graded: bool) -> None:
    module, _, loader = private(Tracking(how))
    x, _ = next(iter(loader))
    with torch.set_grad_enabled(graded), pytest.raises(NotPrivateError, match=r"no noise, got \['mean'\]"):
        module(x)
    assert not module.state_dict()["mean"].any()


def test_running_statistics_of_torchs_own_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True))
    module, _, loader = private(nn.Sequential(module, nn.Flatten()))
    with pytest.raises(NotPrivateError, match=r"'0\.2\.running_mean', '0\.2\.running_var'"):
        module(next(iter(loader))[0])


@pytest.mark.parametrize(
    "module",
    [Tracking("never"), Tracking("not saved"), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))],
)
def test_buffers_that_stay_are_not_saved_or_follow_the_weights_may_be_there(module: nn.Module) -> None:
    module, optimizer, loader = private(nn.Sequential(module))
    train(module, optimizer, loader, plain)
    assert engine_of(module).steps == 3


# ---- what fails on its way


class Failing(Net):
    """Raises when told, in its forward or in its backward."""

    fails = ""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = super().forward(x)
        if self.fails == "forward":
            raise OSError("by chance")
        return _Broken.apply(logits) if self.fails == "backward" else logits


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise OSError("by chance")


def held(module: nn.Module) -> set[type]:
    return {type(p) for p in module.parameters()}


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_pass_that_fails_leaves_the_modules_own_parameters_and_releases_nothing(fails: str) -> None:
    module, optimizer, loader = private(Failing())
    for x, y in loader:
        plain(module, x, y).backward()
        optimizer.step()
        break
    module.fails = fails
    before = module.last.weight.detach().clone()
    for x, y in loader:
        with pytest.raises(OSError, match="by chance"):
            plain(module, x, y).backward()
        break
    assert held(module) == {nn.Parameter}
    with pytest.raises(NotPrivateError, match="went through forward and backward, got none"):
        optimizer.step()
    assert torch.equal(module.last.weight, before)
    module.fails = ""
    train(module, optimizer, loader, plain)  # a new loop goes on
    assert engine_of(module).steps == 4


def test_what_a_failed_forward_kept_cannot_be_trained_on() -> None:
    module, optimizer, loader = private(Failing())
    batches = iter(loader)
    x, y = next(batches)
    plain(module, x, y).backward()
    optimizer.step()
    module.fails = "forward"
    x, y = next(batches)
    with pytest.raises(OSError, match="by chance"):
        module(x)
    with pytest.raises(NotPrivateError, match=r"call loss\.backward\(\)"):
        module.hidden.sum().square().backward()
    with pytest.raises(NotPrivateError, match="a step needs"):
        optimizer.step()


def test_clipped_gradients_of_a_pass_that_fails_leave_the_modules_own_parameters() -> None:
    module = Failing()
    module.fails = "backward"
    with pytest.raises(OSError, match="by chance"):
        clipped_gradients(
            module, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), DATA, max_grad_norm=1.0
        )
    assert held(module) == {nn.Parameter}


def test_gradients_set_to_zero_instead_of_none_are_as_good() -> None:
    ends = []
    for to_none in (True, False):
        torch.manual_seed(3)
        module, optimizer, loader = private(Net())
        for x, y in loader:
            optimizer.zero_grad(set_to_none=to_none)
            plain(module, x, y).backward()
            optimizer.step()
        ends.append(module.last.weight.detach().clone())
    assert torch.equal(*ends)
