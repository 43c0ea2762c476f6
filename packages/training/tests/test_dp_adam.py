"""DP-Adam with bias correction: steps as long as without the noise, from public numbers alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_training import DPAdamBC, QuantileClipping, engine_of, make_private


class Point(nn.Module):
    """A point w in space; every sample's loss is quadratic in it."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, size))

    def forward(self, x):
        return x + self.w


def private(module, data, optimizer, batch_size, **options):
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size)
    defaults = {"module": module, "optimizer": optimizer, "data_loader": loader, "seed": 4}
    return make_private(**defaults | options)


def speed(optimizer_class, steps=300, lr=1e-4, **options):
    """Towards 1 on sum_k h_k (w_k - 1)^2 / 2, as a share of lr, for the flat and the steep coordinates."""
    slopes = torch.tensor([0.05, 0.1]).repeat_interleave(200)
    module = Point(400)
    optimizer = optimizer_class(module.parameters(), lr=lr, **options)
    settings = {"noise_multiplier": 0.5, "max_grad_norm": 1.6}  # the noise on each coordinate has std 0.1
    module, optimizer, loader = private(module, (torch.zeros(8, 400),), optimizer, 8, **settings)
    places = []
    for (x,) in loader.draws(steps):
        places.append(module.w.detach()[0].clone())
        (0.5 * slopes * (module(x) - 1).square()).sum(1).mean().backward()
        optimizer.step()
    assert engine_of(module).coordinate_noise_std == pytest.approx(0.1)
    late = (places[-1] - places[steps // 2]) / (lr * (steps - 1 - steps // 2))
    return float(late[:200].mean()), float(late[200:].mean())


def test_bias_correction_makes_steps_as_long_as_sign_descent_where_noise_hides_the_scale():
    flat, steep = speed(DPAdamBC, variance_floor=1e-3)
    assert 0.85 < flat < 1.25
    assert 0.85 < steep < 1.25
    flat, steep = speed(torch.optim.Adam)  # g / sqrt(g^2 + s^2)
    assert flat == pytest.approx(0.45, abs=0.1)
    assert steep == pytest.approx(0.71, abs=0.1)


def test_the_default_floor_keeps_coordinates_without_a_signal_within_ten_times_dp_adams_steps():
    for optimizer_class, least, most in ((torch.optim.Adam, 0.5, 1.2), (DPAdamBC, 0.5, 10.0)):
        module = Point(500)
        optimizer = optimizer_class(module.parameters(), lr=1.0)
        settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        module, optimizer, loader = private(module, (torch.zeros(8, 500),), optimizer, 8, **settings)
        before, furthest = module.w.detach().clone(), 0.0
        for (x,) in loader.draws(8):
            (0.0 * module(x)).sum(1).mean().backward()
            optimizer.step()
            furthest = max(furthest, float((module.w.detach() - before).abs().max()))
            before = module.w.detach().clone()
        assert least < furthest < most * 1.2


def trained(optimizer_class, steps=6, **options):
    torch.manual_seed(0)
    module = TinyViT()
    optimizer = optimizer_class(module.parameters(), lr=0.01, **options)
    settings = {"noise_multiplier": 0, "max_grad_norm": 0.5, "sampling": "none"}
    module, optimizer, loader = private(module, images(12), optimizer, 4, **settings)
    for _ in range(steps // 3):
        for x, y in loader:
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_noise_it_is_adam(decay):
    ours = trained(DPAdamBC, variance_floor=1e-30, weight_decay=decay)
    # parameters whose gradient is rounding only have no direction to agree on: eps and floor leave them in place
    theirs = trained(torch.optim.AdamW, eps=1e-15, weight_decay=decay)
    close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.98
    assert float((ours - theirs).abs().max()) < 2 * 6 * 0.01


def test_the_variance_taken_away_follows_the_threshold_that_was_in_force():
    module = Point(6)
    optimizer = DPAdamBC(module.parameters(), betas=(0.9, 0.5))
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "clipping": QuantileClipping(learning_rate=2.0)}
    module, optimizer, loader = private(module, (torch.zeros(8, 6),), optimizer, 4, **options)
    engine, expected, stds = engine_of(module), 0.0, set()
    for (x,) in loader.draws(4):
        bound = engine.clip_norm
        (module(x) - 1).square().sum(1).mean().backward()
        optimizer.step()
        std = engine.plan.noise_std_at(bound) / 4
        expected = 0.5 * expected + 0.5 * std**2
        stds.add(std)
    assert len(stds) == 4
    assert optimizer.state[module.w]["noise_square"] == pytest.approx(expected)


def test_parts_of_a_draw_do_not_step():
    module = Point(6)
    optimizer = DPAdamBC(module.parameters())
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "max_physical_batch_size": 2}
    module, optimizer, loader = private(module, (torch.zeros(20, 6),), optimizer, 10, **options)
    for (x,) in loader:
        module(x).square().sum(1).mean().backward()
        optimizer.step()
    assert optimizer.state[module.w]["step"] == engine_of(module).steps == 2


def test_a_restored_state_goes_on_as_it_was():
    ends = []
    for restart in (False, True):
        module = Point(6)
        optimizer = DPAdamBC(module.parameters(), lr=0.1)
        options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        module, optimizer, loader = private(module, (torch.zeros(8, 6),), optimizer, 4, **options)
        for step, (x,) in enumerate(loader.draws(4)):
            if restart and step == 2:
                state = optimizer.state_dict()
                optimizer.state.clear()
                optimizer.load_state_dict(state)
            (module(x) - 1).square().sum(1).mean().backward()
            optimizer.step()
        ends.append(module.w.detach().clone())
    assert torch.equal(*ends)


def test_without_an_engine_it_refuses_to_step():
    module = Point(3)
    optimizer = DPAdamBC(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    with pytest.raises(NotPrivateError, match="parameter without a private engine"):
        optimizer.step()
    assert torch.equal(module.w, torch.zeros(1, 3))


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"betas": (0.9, 1.0)}, {"variance_floor": 0}, {"betas": 0.9}])
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(PrivacyParameterError):
        DPAdamBC(Point(3).parameters(), **wrong)
