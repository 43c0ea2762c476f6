import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_models import TinyText, TinyViT, clipped_truth, images, texts

from dpfa_core.errors import BudgetExhausted, LedgerError, NotPrivateError, PrivacyParameterError
from dpfa_core.events import Gaussian, NonPrivate, PoissonSampled
from dpfa_core.ledger import Ledger
from dpfa_training import engine_of, make_private, make_private_with_epsilon

CRITERION = nn.CrossEntropyLoss()


def private(module, data, batch_size=8, optimizer=torch.optim.SGD, **options):
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=True)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "seed": 3} | options
    return make_private(module=module, optimizer=optimizer(module.parameters(), lr=0.1), data_loader=loader, **settings)


def run(module, optimizer, loader, epochs=1):
    for _ in range(epochs):
        for x, y in loader:
            CRITERION(module(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_plain_loop_takes_one_recorded_step_for_each_draw(optimizer):
    module, opt, loader = private(TinyViT(), images(40), optimizer=optimizer)
    run(module, opt, loader, epochs=2)
    engine = engine_of(module)
    assert engine.steps == 2 * len(loader) == 10
    assert list(engine.ledger.events()) == [(PoissonSampled(0.2, Gaussian(1.0)), 10)]
    assert engine.checked_samples >= 2


def test_noiseless_step_is_the_clipped_sum_over_the_expected_batch_size():
    torch.manual_seed(0)
    module, data = TinyText(), texts(12)
    before, truth_module = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    loader = DataLoader(TensorDataset(*data), batch_size=12)
    opt = torch.optim.SGD(module.parameters(), lr=1.0)
    make_private(
        module=module,
        optimizer=opt,
        data_loader=loader,
        noise_multiplier=0,
        max_grad_norm=0.2,
        sampling="none",
    )
    run(module, opt, loader)
    truth, _ = clipped_truth(truth_module, data, 0.2)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(before[name] - value, truth[name].float() / 12, rtol=1e-4, atol=1e-6)
    assert list(engine_of(module).ledger.events()) == [(NonPrivate(), 1)]
    assert engine_of(module).get_epsilon(1e-5) == math.inf


def test_noise_has_the_planned_std_and_every_parameter_gets_it():
    module, (x, y) = TinyViT(), images(6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()  # all gradients but the head's are zero
    module, opt, loader = private(module, (x, y), 6, noise_multiplier=50.0, max_grad_norm=1e-3)
    before = copy.deepcopy(module.state_dict())
    batch = next(iter(loader))
    CRITERION(module(batch[0]), batch[1]).backward()
    opt.step()
    drawn = torch.cat([(before[n] - v).flatten() for n, v in module.state_dict().items()]) / 0.1 * 6
    count, std = drawn.numel(), 50.0 * 1e-3
    assert all(bool((before[n] != v).all()) for n, v in module.state_dict().items())
    # chi-square of drawn^2 is within five of its own standard deviations
    assert abs(float((drawn / std).square().sum()) - count) < 5 * math.sqrt(2 * count)


def test_same_seed_gives_the_same_weights_and_two_steps_never_the_same_noise():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        module, opt, loader = private(TinyViT(), images(20), 5)
        run(module, opt, loader)
        ends.append(module.head.weight.detach().clone())
    assert torch.equal(*ends)
    handed = []
    module, opt, loader = private(TinyViT(), images(20), 5, max_grad_norm=1e-9, noise_multiplier=1e9)
    for x, y in loader:
        CRITERION(module(x), y).backward()
        opt.step()
        handed.append(module.head.weight.grad.flatten().clone())
    correlation = torch.corrcoef(torch.stack(handed)) - torch.eye(len(handed))
    assert correlation.abs().max() < 0.6


def test_virtual_batches_equal_the_whole_draw():
    ends = []
    for size in (None, 3, 1):
        torch.manual_seed(0)
        module, opt, loader = private(TinyViT(), images(40), 16, max_physical_batch_size=size)
        run(module, opt, loader)
        assert engine_of(module).steps == len(loader)
        ends.append(module.qkv.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-4, atol=1e-6)


def test_one_row_at_a_time_is_never_two_also_for_an_empty_draw():
    module, opt, loader = private(TinyViT(), images(60), 1, max_physical_batch_size=1)
    sizes = set()
    for x, y in loader.draws(12):
        sizes.add((len(x), int(engine_of(module)._batch.weights.sum())))
        CRITERION(module(x), y).backward()
        opt.step()
    assert sizes == {(1, 0), (1, 1)}
    assert engine_of(module).steps == 12


def test_leaving_a_draw_early_does_not_join_it_with_the_next():
    torch.manual_seed(0)
    module, opt, loader = private(TinyViT(), images(40), 16, max_physical_batch_size=3)
    engine = engine_of(module)
    for x, y in loader:
        CRITERION(module(x), y).backward()
        opt.step()
        break
    assert engine.in_draw
    assert engine.steps == 0
    x, y = next(iter(loader))
    assert not engine.in_draw
    CRITERION(module(x), y).backward()


def test_empty_draws_take_a_noisy_step():
    module, opt, loader = private(TinyViT(), images(400), 1)
    before = module.head.weight.detach().clone()
    for count, (x, y) in enumerate(loader):
        CRITERION(module(x), y).backward()
        opt.step()
        assert not torch.equal(before, module.head.weight)
        before = module.head.weight.detach().clone()
        if count == 12:
            break
    assert engine_of(module).steps == 13


def test_evaluation_is_free():
    module, opt, loader = private(TinyViT(), images(20), 5)
    x, _ = images(7)
    with torch.no_grad():
        module(x)
    module.eval()
    module(x).sum()
    module.train()
    run(module, opt, loader)


def started(**options):
    module, opt, loader = private(TinyViT(), images(20), 5, **options)
    x, y = next(iter(loader))
    return module, opt, loader, x, y


def test_step_without_backward_raises():
    _module, opt, *_ = started()
    with pytest.raises(NotPrivateError, match="went through forward and backward"):
        opt.step()


def test_two_steps_on_one_batch_raise():
    module, opt, _, x, y = started()
    CRITERION(module(x), y).backward()
    opt.step()
    with pytest.raises(NotPrivateError, match="none since the last step"):
        opt.step()


def test_foreign_batch_raises():
    module, _, loader = private(TinyViT(), images(20), 5)
    with pytest.raises(NotPrivateError, match="batch from the private loader"):
        module(images(5)[0])
    next(iter(loader))
    with pytest.raises(NotPrivateError, match="rows that the private loader drew"):
        module(images(19)[0])


def test_second_forward_on_a_batch_raises():
    module, _, _, x, _ = started()
    module(x)
    with pytest.raises(NotPrivateError, match="second forward"):
        module(x)


def test_second_backward_raises():
    module, _, _, x, y = started()
    loss = CRITERION(module(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(NotPrivateError, match="one backward per forward"):
        loss.backward()


def test_skipped_batch_raises():
    _module, _opt, loader = private(TinyViT(), images(20), 5)
    rows = iter(loader)
    next(rows)
    with pytest.raises(NotPrivateError, match="every batch drawn must be used"):
        next(rows)


def test_another_optimizer_cannot_touch_private_parameters():
    module, _, _, x, y = started()
    CRITERION(module(x), y).backward()
    before = module.head.weight.detach().clone()
    with pytest.raises(NotPrivateError, match="only the optimiser given"):
        torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(before, module.head.weight)


def test_gradient_that_came_around_the_engine_raises():
    module, opt, _, x, y = started()
    (CRITERION(module(x), y) + module.head.weight.square().sum()).backward()
    with pytest.raises(NotPrivateError, match="must come from the engine"):
        opt.step()


def test_optimizer_must_hold_exactly_the_trainable_parameters():
    module = TinyViT()
    loader = DataLoader(TensorDataset(*images(20)), batch_size=5)
    some = torch.optim.SGD(module.head.parameters(), lr=0.1)
    with pytest.raises(NotPrivateError, match="must hold every trainable parameter"):
        make_private(module=module, optimizer=some, data_loader=loader, noise_multiplier=1, max_grad_norm=1)
    more = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(NotPrivateError, match="nothing else"):
        make_private(module=module, optimizer=more, data_loader=loader, noise_multiplier=1, max_grad_norm=1)


def test_own_sampler_is_refused_not_replaced():
    data = TensorDataset(*images(20))
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 20, 20)
    module = TinyViT()
    with pytest.raises(NotPrivateError, match="WeightedRandomSampler"):
        make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=5, sampler=sampler),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_sampling_none_is_accepted_without_noise_only():
    with pytest.raises(PrivacyParameterError, match="wherever noise is added"):
        private(TinyViT(), images(20), 5, sampling="none")


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(PrivacyParameterError, match="between 1 and the 20 training records"):
        private(TinyViT(), images(20), 21)


def test_ledger_of_another_unit_or_relation_is_refused():
    with pytest.raises(LedgerError, match='unit="example"'):
        private(TinyViT(), images(20), 5, ledger=Ledger.memory(unit="token"))
    module, opt, loader = private(TinyViT(), images(20), 5, ledger=Ledger.memory(relation="replace"))
    x, y = next(iter(loader))
    CRITERION(module(x), y).backward()
    before = module.head.weight.detach().clone()
    with pytest.raises(LedgerError, match="relation='replace'"):
        opt.step()
    assert torch.equal(before, module.head.weight)


def test_a_ledger_that_cannot_be_written_stops_the_step(tmp_path):
    ledger = Ledger.open(tmp_path / "l.db", unit="example", relation="add_or_remove", delta=1e-5)
    module, opt, loader = private(TinyViT(), images(20), 5, ledger=ledger)
    x, y = next(iter(loader))
    CRITERION(module(x), y).backward()
    ledger.close()
    before = module.head.weight.detach().clone()
    with pytest.raises(LedgerError):
        opt.step()
    assert torch.equal(before, module.head.weight)


def test_with_epsilon_ends_at_the_target_and_refuses_one_step_more():
    module = TinyViT()
    loader = DataLoader(TensorDataset(*images(40)), batch_size=8)
    module, opt, loader = make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        target_epsilon=2.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=0.5,
    )
    run(module, opt, loader, epochs=2)
    spent = engine_of(module).get_epsilon(1e-3)
    assert 1.9 < spent <= 2.0
    before = module.head.weight.detach().clone()
    with pytest.raises(BudgetExhausted, match="calibrated for 10 steps"):
        run(module, opt, loader)
    assert torch.equal(before, module.head.weight)


def test_detached_module_trains_as_usual():
    module, _, _ = private(TinyViT(), images(20), 5)
    engine_of(module).detach()
    CRITERION(module(images(5)[0]), images(5)[1]).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    with pytest.raises(PrivacyParameterError, match="make_private"):
        engine_of(module)


def test_a_copy_of_the_model_is_an_ordinary_model():
    module, opt, _loader, x, y = started()
    twin = copy.deepcopy(module)
    CRITERION(twin(x), y).backward()
    assert twin.head.weight.grad is not None
    CRITERION(module(x), y).backward()
    opt.step()


class Trimmed(nn.Module):
    """Leaves out the padding that all rows share, and so much of its positions."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        words = words[:, : max(1, int((words != 0).sum(1).max()))]
        x = torch.tanh(self.words(words) + self.positions[:, : words.shape[1]])
        return self.head((x * (words != 0)[..., None]).sum(1))


def test_a_batch_may_be_longer_than_the_samples_of_the_self_check():
    torch.manual_seed(0)
    module, words, labels = Trimmed(), torch.randint(1, 9, (12, 8)), torch.randint(0, 3, (12,))
    words[:4, 5:] = 0  # the first rows are the ones that are checked
    before, truth_module = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    opt = torch.optim.SGD(module.parameters(), lr=1.0)
    make_private(
        module=module,
        optimizer=opt,
        data_loader=DataLoader(TensorDataset(words, labels), batch_size=12),
        noise_multiplier=0,
        max_grad_norm=0.5,
        sampling="none",
    )
    run(module, opt, DataLoader(TensorDataset(words, labels), batch_size=12))
    truth, _ = clipped_truth(truth_module, (words, labels), 0.5)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(before[name] - value, truth[name].float() / 12, rtol=1e-4, atol=1e-6)
