"""Fault 15: what is seen of the training and is not released is marked as private."""

import inspect
import re

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyViT, images

from dpfa_training import NOT_COVERED, Engine, QuantileClipping, clipped_gradients, engine_of, make_private

PUBLIC = {"SUMS_UNITS", "checked_samples", "clip_norm", "coordinate_noise_std", "in_draw", "steps"}
"""Numbers that an engine shows and that follow from the plan, the sampler's sizes and released values."""


def test_fault_15_loss_norms_and_clip_fractions_are_told_to_be_uncovered():
    told = " ".join(NOT_COVERED).lower()
    assert all(figure in told for figure in ("loss", "accuracy", "gradient norms", "clip fractions", "not covered"))
    assert "not private" in clipped_gradients.__doc__
    assert "not private" in Engine.state.__doc__


def test_fault_15_every_number_that_an_engine_shows_is_public_or_marked_as_private():
    module = TinyViT()
    module, opt, loader = make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*images(20)), batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        clipping=QuantileClipping(),
        seed=1,
    )
    for x, y in loader:
        nn.functional.cross_entropy(module(x), y).backward()
        opt.step()
    engine = engine_of(module)
    shown = {name for name in (*vars(engine), *vars(Engine)) if not name.startswith("_")}
    numbers = {name for name in shown if isinstance(getattr(engine, name), int | float | torch.Tensor)}
    assert "non_finite_samples" in numbers
    for name in numbers - PUBLIC:
        assert re.search(rf'self\.{name} = .*\n +"""[^"]*private', inspect.getsource(Engine)), name


def test_fault_15_an_adaptive_clip_shows_the_noised_share_and_not_the_true_one():
    """With the noise of the count far above its signal, two opposite data sets move the threshold alike."""
    ends = []
    for scale in (1e-6, 1e6):
        torch.manual_seed(0)
        module, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), images(20)
        module, opt, loader = make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(x * scale, y), batch_size=5),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
            clipping=QuantileClipping(count_noise_std=1e6, learning_rate=1e-6),
            seed=1,
        )
        for x, y in loader:
            nn.functional.cross_entropy(module(x), y).backward()
            opt.step()
        ends.append(engine_of(module).clip_norm)
    assert abs(ends[0] / ends[1] - 1) < 1e-5 < abs(ends[0] / 0.5 - 1)
