import math

import pytest
import torch
from training_models import TinyText, TinyViT, clipped_truth, images, per_sample_loss, texts

from dpfa_training import clipped_gradients

CASES = {"vit": (TinyViT, images), "text": (TinyText, texts)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bound", [0.05, 1.0, math.inf])
def test_clipped_sum_equals_one_sample_at_a_time_autograd(case, bound):
    torch.manual_seed(1)
    build, data = CASES[case]
    module, batch = build(), data(13)
    sums, norms = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=bound)
    truth, exact_norms = clipped_truth(module, batch, bound)
    assert torch.all(norms >= exact_norms * (1 - 1e-6))
    torch.testing.assert_close(norms, exact_norms, rtol=1e-4, atol=0)
    assert sums.keys() == truth.keys()
    error = sum((sums[n].double() - truth[n]).square().sum() for n in truth).sqrt()
    size = sum(truth[n].square().sum() for n in truth).sqrt()
    assert error / size <= 1e-5


def test_mean_divides_by_the_batch():
    module, batch = TinyViT(), images(4)
    total, _ = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=1.0)
    mean, _ = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=1.0, reduction="mean")
    for name in total:
        torch.testing.assert_close(mean[name] * 4, total[name])


def test_one_sample_never_adds_more_than_the_bound():
    module = TinyText()
    for seed in range(5):
        batch = texts(1, seed)
        sums, _ = clipped_gradients(module, per_sample_loss, batch, max_grad_norm=0.1)
        assert sum(s.double().square().sum() for s in sums.values()).sqrt() <= 0.1 * (1 + 1e-6)


def test_an_empty_batch_is_a_sum_of_nothing():
    module, (x, y) = TinyViT(), images(3)
    sums, norms = clipped_gradients(module, per_sample_loss, (x[:0], y[:0]), max_grad_norm=1.0)
    assert norms.shape == (0,)
    assert {name: value.shape for name, value in sums.items()} == {n: p.shape for n, p in module.named_parameters()}
    assert not any(value.any() for value in sums.values())


def test_sample_with_a_non_finite_gradient_adds_nothing_and_spares_the_others():
    module, (x, y) = TinyViT(), images(5)
    alone, _ = clipped_gradients(module, per_sample_loss, (x[1:], y[1:]), max_grad_norm=0.5)
    x[0, 0, 0, 0] = math.nan
    together, norms = clipped_gradients(module, per_sample_loss, (x, y), max_grad_norm=0.5)
    assert not norms[0].isfinite()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])


def test_token_mean_loss_is_refused():
    module, batch = TinyText(), texts(4)
    with pytest.raises(ValueError, match=r"must return shape \(4,\)"):
        clipped_gradients(module, lambda m, b: per_sample_loss(m, b).mean(), batch, max_grad_norm=1.0)


def test_plain_gradients_and_state_are_untouched_afterwards():
    module, batch = TinyViT(), images(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    clipped_gradients(module, per_sample_loss, batch, max_grad_norm=1.0)
    assert all(p.grad is None for p in module.parameters())
    per_sample_loss(module, batch).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
