"""The wrapped loader: what of the user's stays, and that a loop which is left joins or repeats nothing."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpfa_core.errors import NotPrivateError, PrivacyParameterError
from dpfa_kernels_torch.noise.keys import KeySource
from dpfa_training.plan import TrainingPlan
from dpfa_training.sampling import Draws, MemoryProbe, PrivateLoader, Users, check_loader
from dpfa_training.sampling.part_timing import PartTiming

WORKERS = [0, 2]


class Heard:
    """Writes down what the engine would hear."""

    def __init__(self):
        self.batches, self.abandoned = [], 0

    def announce(self, batch):
        self.batches.append(batch)

    def abandon(self):
        self.abandoned += 1


class Augmented(Dataset):
    """(record, three random numbers)"""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index, torch.rand(()).item(), random.random(), np.random.rand()


def draws_of(records, batch, max_rows, sampling="poisson", users=None, seed=3):
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sampling": sampling}
    sampler = TrainingPlan(population=records, expected_batch_size=batch, **settings).sampler()
    return Draws(sampler, KeySource(seed, generator="chacha20"), max_rows, users)


def wrapped(dataset=None, batch=10, max_rows=4, sampling="poisson", **options):
    dataset = TensorDataset(torch.arange(100)) if dataset is None else dataset
    heard = Heard()
    source = DataLoader(dataset, batch_size=batch, **options)
    return PrivateLoader(source, draws_of(len(dataset), batch, max_rows, sampling), heard), heard


@pytest.mark.parametrize("workers", WORKERS)
def test_announcements_come_in_the_order_of_the_rows(workers):
    loader, heard = wrapped(num_workers=workers)
    for count, (rows,) in enumerate(loader, start=1):
        assert tuple(rows.tolist()) == heard.batches[-1].indices
        assert len(heard.batches) == count
    assert [batch.draw for batch in heard.batches if batch.last] == list(range(10)) == list(range(len(loader)))


def pairs(rows):
    return [row[0].item() for row in rows], "mine"


def started(worker):
    torch.set_num_threads(1)


def test_options_of_the_users_loader_stay():
    loader, _ = wrapped(
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        timeout=30,
        multiprocessing_context="fork",
        collate_fn=pairs,
        worker_init_fn=started,
        drop_last=True,  # without effect: no batch is a short rest
        shuffle=True,
    )
    inner = loader._rows
    assert (inner.num_workers, inner.persistent_workers, inner.prefetch_factor, inner.timeout) == (2, True, 3, 30)
    assert inner.multiprocessing_context.get_start_method() == "fork"
    assert inner.worker_init_fn is started
    seen = [batch for _ in range(2) for batch, mine in loader if mine == "mine"]
    again = [list(b.indices) for b in draws_of(100, 10, 4).batches(20)]
    assert seen == again


@pytest.mark.parametrize("persistent", [False, True])
def test_fault_5_leaving_a_loop_with_workers_ahead_joins_and_repeats_no_draw(persistent):
    loader, heard = wrapped(num_workers=2, prefetch_factor=4, persistent_workers=persistent)
    for _ in loader:
        if heard.batches[-1].draw == 1 and not heard.batches[-1].last:
            break
    left = heard.batches[-1]
    for (rows,) in loader:
        assert tuple(rows.tolist()) == heard.batches[-1].indices
    following = heard.batches[heard.batches.index(left) + 1 :]
    assert heard.abandoned == 1
    assert following[0].draw == 2  # neither the rest of draw 1, nor what workers had fetched of draw 3
    assert following[0].start == 0
    assert sorted({batch.draw for batch in following}) == list(range(2, 12))


def test_one_loop_at_a_time():
    loader, _ = wrapped()
    outer = iter(loader)
    next(outer)
    next(iter(loader))
    with pytest.raises(NotPrivateError, match="one loop at a time"):
        next(outer)


@pytest.mark.parametrize("workers", WORKERS)
def test_keys_that_change_in_a_loop_throw_away_what_was_fetched(workers):
    loader, heard = wrapped(num_workers=workers)
    fresh, changed = KeySource(), False
    for (rows,) in loader:
        assert tuple(rows.tolist()) == heard.batches[-1].indices
        if len(heard.batches) == 4 and not changed:
            loader.sampler.renew(fresh)
            changed = True
    after = heard.batches[4:]
    expected = draws_of(100, 10, 4)
    expected.keys, expected.position = fresh, after[0].draw
    count = len({batch.draw for batch in after})
    assert [b.indices for b in after] == [b.indices for b in expected.batches(count)]
    assert after[0].start == 0
    assert len({b.draw for b in heard.batches}) in (10, 11)


def test_augmentation_in_workers_depends_on_the_place_in_the_run_alone():
    def seen(skip):
        torch.manual_seed(1)
        loader, _ = wrapped(Augmented(), num_workers=2, multiprocessing_context="fork", max_rows=3)
        loader.sampler.position = skip
        return [
            tuple(map(float, (a, b, c, d))) for rows in loader.draws(6 - skip) for a, b, c, d in zip(*rows, strict=True)
        ]

    whole, part = seen(0), seen(3)
    assert whole[-len(part) :] == part
    assert len({row[1] for row in whole}) == len({row[3] for row in whole}) == len(whole)


@pytest.mark.parametrize("workers", WORKERS)
def test_beginning_an_epoch_does_not_move_the_generator_of_dropout(workers):
    loader, _ = wrapped(num_workers=workers)
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(state, torch.get_rng_state())


# ---- whose loader


class Mine(SequentialSampler):
    pass


DATA = TensorDataset(torch.arange(20))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("WeightedRandomSampler", {"sampler": WeightedRandomSampler([1.0] * 20, 20), "batch_size": 5}),
        ("SubsetRandomSampler", {"sampler": SubsetRandomSampler(range(10)), "batch_size": 5}),
        ("DistributedSampler", {"sampler": DistributedSampler(DATA, 2, 0), "batch_size": 5}),
        ("Mine", {"sampler": Mine(DATA), "batch_size": 5}),
        ("RandomSampler", {"sampler": RandomSampler(DATA, replacement=True), "batch_size": 5}),
        ("RandomSampler", {"sampler": RandomSampler(DATA, num_samples=7), "batch_size": 5}),
        ("list", {"batch_sampler": [[0, 1], [2, 3]]}),
        ("BatchSampler", {"batch_sampler": BatchSampler(SequentialSampler(DATA), 5, False)}),
        ("SequentialSampler", {"batch_size": None}),
    ],
)
def test_fault_9_a_sampler_of_the_users_own_is_refused_by_name(name, options):
    with pytest.raises(NotPrivateError, match=f"whole dataset, got .*{name}"):
        check_loader(DataLoader(DATA, **options))


@pytest.mark.parametrize("shuffle", [False, True])
def test_fault_9_a_shuffled_loader_is_drawn_as_it_is_accounted(shuffle):
    source = DataLoader(DATA, batch_size=5, shuffle=shuffle, drop_last=True)
    assert check_loader(source) == (20, 5)
    loader = PrivateLoader(source, draws_of(20, 5, None), Heard())
    sizes = {len(rows) for _ in range(5) for (rows,) in loader}
    assert len(sizes) > 1  # Poisson batches, not slices of a permutation


def test_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(NotPrivateError, match="map-style"):
        check_loader(DataLoader(Stream(), batch_size=2))


# ---- users


def test_a_users_records_come_together_and_every_row_knows_its_unit():
    ids = ["b", "a", "a", "c", "b", "a", "d"]
    users = Users(ids, 7)
    assert users.records == ((0, 4), (1, 2, 5), (3,), (6,))
    assert users.largest == 3
    for max_rows in (None, 3, 4):
        cut = draws_of(4, 4, max_rows, users=users)  # probability 1
        batches = list(cut.batches(1))
        assert [i for b in batches for i, w in zip(b.indices, b.weights, strict=True) if w] == [0, 4, 1, 2, 5, 3, 6]
        for batch in batches:
            assert max_rows is None or len(batch.indices) <= max_rows
            real = batch.weights > 0
            assert batch.units[real].unique().tolist() == list(range(batch.count))
            assert (batch.units[~real] == batch.count).all()
            for unit in range(batch.count):
                mine = [batch.indices[row] for row in (batch.units == unit).nonzero().flatten().tolist()]
                assert tuple(mine) in users.records  # whole, never divided
    assert len(list(draws_of(4, 4, 3, users=users).batches(1))) == 3


def test_an_empty_draw_of_users_has_padding_only():
    users = Users(range(10**4), 10**4)
    batch = next(b for b in draws_of(10**4, 1, None, users=users).batches(20) if not b.count)
    assert batch.units.tolist() == [0, 0]
    assert not batch.weights.any()


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 2], "must name the user of each of the 3 records"),
        ([[1], [2], [3]], "must be hashable"),
        ([1.0, 2.0, float("nan")], "must equal themselves"),
    ],
)
def test_bad_user_ids_are_refused(ids, text):
    with pytest.raises(PrivacyParameterError, match=text):
        Users(ids, 3)


def test_a_user_larger_than_a_physical_batch_is_refused():
    with pytest.raises(PrivacyParameterError, match=r"hold all records of a user \(3 at most\)"):
        draws_of(2, 2, 2, users=Users([1, 1, 1, 2], 4))


# ---- memory


def memory_loader(free, workers=0, width=64):
    module = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
    probe = MemoryProbe(module, free=lambda module: free)
    cut = draws_of(400, 100, probe)
    data = DataLoader(TensorDataset(torch.rand(400, 1)), batch_size=100, num_workers=workers)
    return module, probe, PrivateLoader(data, cut, Heard())


@pytest.mark.parametrize("workers", WORKERS)
def test_rows_are_chosen_from_what_two_small_batches_keep(workers):
    module, probe, loader = memory_loader(4 * 2**10 * 20, workers)
    sizes = []
    for (x,) in loader.draws(3):
        module(x).sum().backward()
        sizes.append(len(x))
    # the forward keeps the tanh's output and the input: 64 + 1 floats for each row, and as much for gradients
    fitting = 2**10 * 20 // (2 * 4 * 65)
    assert probe.chosen == fitting == 39
    assert sizes[:2] == [2, 4]
    assert max(sizes) == fitting
    assert not module._forward_hooks


def test_choice_of_rows_moves_no_draw():
    found = []
    for free in (1, 10**5, 10**12):
        module, probe, loader = memory_loader(free)
        drawn = {}
        for (x,) in loader.draws(3):
            module(x).sum().backward()
            batch = loader._listener.batches[-1]
            real = [i for i, w in zip(batch.indices, batch.weights, strict=True) if w]
            drawn.setdefault(batch.draw, []).extend(real)
        found.append(drawn)
        assert probe.chosen >= 2
    assert found[0] == found[1] == found[2]


def test_evaluation_is_not_measured_and_the_clock_may_take_less():
    module = nn.Linear(3, 3)
    probe = MemoryProbe(nn.Sequential(module), timed=True, free=lambda module: 10**9)
    watched = probe._module
    assert [probe.rows() for _ in range(3)] == [2, 4, 4]
    probe.expect(2)
    with torch.no_grad():
        watched(torch.rand(2, 3))
    watched.eval()
    watched(torch.rand(2, 3))
    assert probe._kept == {}
    watched.train()
    for rows in (2, 4):
        probe.expect(rows)
        watched(torch.rand(rows, 3))
    assert probe.chosen is None  # memory would allow millions: the clock decides
    for size, each in ((2, 1.0), (4, 0.99), (8, 0.5), (16, 0.495)):
        for n in range(max(3, 32 // size)):
            assert probe.rows() == size
            assert probe.chosen is None
            probe.clipped(size, size * each * (1.2 - 0.1 * (n % 3)))
    assert probe.chosen == probe.rows() == 8  # 16 is faster, but by too little to try 32 or to be worth its memory
    probe.clipped(16, 0.0)
    assert probe.chosen == 8


def test_a_size_that_gains_something_is_taken_though_the_next_is_not_tried():
    timing = PartTiming(8, 1000)
    for size, each in ((8, 1.0), (16, 0.9), (32, 0.87)):
        timing.took(size + 1, 0.0)  # a part of another size says nothing
        for _ in range(max(3, 32 // size)):
            timing.took(size, size * each)
    assert timing.chosen == 32


def test_small_draws_end_the_trial():
    timing = PartTiming(4, 1000)
    for rows in (*[4] * 8, 5, 3, 7, 6):
        timing.took(rows, 1.0)
    assert timing.chosen == 4
    nothing = PartTiming(4, 1000)
    for _ in range(3):
        nothing.took(2, 1.0)
    assert nothing.chosen == 1000
    assert PartTiming(4, 3).rows() == 3
