"""Uses without a rule: the smallest module that keeps samples apart runs once for each of them, exactly."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import assert_exact

from dpfa_core.errors import NotPrivateError
from dpfa_training import clipped_gradients, engine_of, make_private
from dpfa_training.per_sample import RULES, register
from dpfa_training.per_sample.use import FUNCTIONS


def squares(module, x):
    out = module(x).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).square().sum(1)


class Rectify(nn.Module):
    """F.prelu has no rule."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3]))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.prelu(self.linear(x), self.slope)


class Experts(nn.Module):
    """Each expert sees some tokens of the batch, in no order that counts samples."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen = (x.sum(-1) > 0).long()
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


@pytest.mark.parametrize("rows", [1, 5])
def test_module_with_an_unknown_use_is_exact_and_announced(rows, caplog):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), Rectify(), nn.Linear(4, 2))
    assert_exact(module, squares, torch.randn(rows, 6, 3), shares=())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 has no rule" in record.getMessage()
    assert "B x 21 numbers" in record.getMessage()


def test_experts_run_where_samples_are_rows(caplog):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), Experts(), nn.Linear(4, 2))
    assert_exact(module, squares, torch.randn(5, 6, 3))
    assert {record.getMessage().split(" has")[0] for record in caplog.records} == {"1"}


def test_a_bare_parameter_of_the_root_makes_the_root_run_one_by_one(caplog):
    class Root(Rectify):
        pass

    torch.manual_seed(0)
    assert_exact(Root(), squares, torch.randn(3, 6, 4), shares=())
    assert "the module has no rule" in caplog.text


def test_what_cannot_be_taken_apart_is_refused_by_name():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            return F.prelu(x, self.slope).mean()

    with pytest.raises(NotPrivateError, match="the module"):
        clipped_gradients(Sorted(), lambda m, x: m(x).expand(len(x)), torch.randn(3, 4), max_grad_norm=1.0)


def test_a_registered_rule_replaces_the_fallback(caplog):
    @register(F.prelu)
    def prelu(use, input, weight):
        copies = use.samples(input).spread(use.copies(weight), input.shape, input.dim())
        return torch.where(input > 0, input, input * copies)

    try:
        torch.manual_seed(0)
        assert_exact(nn.Sequential(nn.Linear(3, 4), Rectify()), squares, torch.randn(5, 6, 3))
        assert not caplog.records
    finally:
        for function in [function for function, rule in FUNCTIONS.items() if rule is prelu]:
            del FUNCTIONS[function]


class Mapped(nn.Module):
    """Takes its samples apart by itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.func.vmap(lambda row: torch.tanh(row @ self.weight))(x)


def test_a_parameter_inside_a_transform_runs_one_by_one(caplog):
    torch.manual_seed(0)
    assert_exact(nn.Sequential(nn.Linear(3, 4), Mapped()), squares, torch.randn(5, 6, 3), shares=())
    assert "1 has no rule" in caplog.text


class Chosen(nn.Module):
    """Multiplies the chosen tokens only: as many rows as samples, by chance or not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = self.linear(x[chosen])
        return out


@pytest.mark.parametrize("each", [1, 2])
def test_rows_chosen_by_content_are_never_taken_for_samples(each, caplog):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 4)
    x[..., 0] = -1.0
    x[:, :each, 0] = 1.0  # as many chosen tokens in every sample
    module = nn.Sequential(Chosen(), nn.Linear(4, 2))
    assert_exact(module, squares, x, shares=())
    assert "0 has no rule" in caplog.text


def test_a_loop_over_samples_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            lengths = (x[..., 0] > 0).sum(1).tolist()
            packed = torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])
            return torch.stack([part.sum(0) for part in self.linear(packed).split(lengths)])

    x = torch.randn(4, 5, 4).abs()
    with pytest.raises(NotPrivateError, match="loop over samples"):
        clipped_gradients(nn.Sequential(Packed()), squares, x, max_grad_norm=1.0)


class Opaque(nn.Module):
    """A layer whose parameter never meets a torch function that could be seen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 2.0, 0.5]))

    def forward(self, x):
        return x * self.scale


class OpaqueRule:
    def refusal(self, module):
        return "it has no scale" if module.scale is None else ""

    def forward(self, module, names, tape, anchor):
        return lambda x: _Scaled.apply(x, module.scale.detach(), anchor, tape, names["scale"])


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, anchor, tape, name):
        ctx.save_for_backward(x, scale)
        ctx.tape, ctx.name = tape, name
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        ctx.tape.add(ctx.name, "bare", (grad * x).flatten(1, -2).sum(1))
        return grad * scale, None, None, None, None


def test_a_rule_by_layer_type(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(RULES, Opaque, OpaqueRule())
    assert_exact(nn.Sequential(nn.Linear(4, 3), Opaque(), nn.Linear(3, 2)), squares, torch.randn(5, 6, 4))


def private(module, rows=12):
    return make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(rows, 6, 4)), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        seed=1,
    )


def test_a_root_that_must_run_one_by_one_is_refused_with_the_remedy():
    module, _, loader = private(Rectify())
    with pytest.raises(NotPrivateError, match=r"nn\.Sequential\(module\)"):
        module(next(iter(loader))[0])
    module, optimizer, loader = private(nn.Sequential(Rectify()))
    for (x,) in loader:
        module(x).square().mean((1, 2)).mean().backward()
        optimizer.step()
    assert engine_of(module).steps == 3


class Sometimes(nn.Module):
    """In training, the second layer takes part in every other forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += self.training
        x = self.first(x)
        return x if self.training and self.calls % 2 else self.second(x)


def test_a_parameter_that_a_step_does_not_use_gets_noise_alone():
    module, optimizer, loader = private(Sometimes())
    before = module.second.weight.detach().clone()
    (x,) = next(iter(loader))
    module(x).square().mean((1, 2)).mean().backward()
    optimizer.step()
    assert module.calls == 1
    assert not torch.equal(module.second.weight, before)


def test_batch_norm_by_function_is_refused():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.variance, self.scale, training=self.training)

    with pytest.raises(NotPrivateError, match="couples the samples"):
        clipped_gradients(nn.Sequential(Normalised()), squares, torch.randn(3, 4), max_grad_norm=1.0)


class Routed(nn.Module):
    """Sends the tokens whose first number is positive through a layer, by sorting and splitting."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        flat = x.reshape(-1, 4)
        order = torch.argsort((flat[:, 0] <= 0).long(), stable=True)
        count = int((flat[:, 0] > 0).sum())
        sorted_ = flat[order]
        out = torch.cat([self.linear(sorted_[:count]), sorted_[count:]])
        return out[torch.argsort(order)].view_as(x)


def test_routed_tokens_that_come_to_a_multiple_of_the_samples_are_refused():
    module, optimizer, loader = private(nn.Sequential(Routed()))
    engine = engine_of(module)
    draws = iter(loader)
    (x,) = next(draws)
    x = x.abs()  # all tokens go through the layer, when the self-check looks
    module(x).square().mean((1, 2)).mean().backward()
    optimizer.step()
    assert engine.steps == 1
    (x,) = next(draws)
    x = x.abs()
    x[:, :3, 0] *= -1.0  # half of them: three tokens per sample on average
    with pytest.raises(NotPrivateError, match="laid out in another way"):
        module(x)


@pytest.mark.parametrize("shift", [0, 1])
def test_flattened_sequences_may_have_another_length_in_the_next_batch(shift):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x[:, shift:].reshape(-1, 4)).view(len(x), -1, 4)

    module, optimizer, loader = private(nn.Sequential(Flat()))
    for length, (x,) in zip((6, 4, 5), loader, strict=True):
        module(x[:, :length]).square().mean((1, 2)).mean().backward()
        optimizer.step()
    assert engine_of(module).steps == 3
