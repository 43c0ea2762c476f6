"""Where tensors keep the samples: found from two batch sizes, never from a size that happens to fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfa_training.per_sample.counting import Counting
from dpfa_training.per_sample.samples import Samples, find

LAYOUTS = [Samples(0), Samples(1), Samples(2), Samples(0, "major"), Samples(0, "minor")]


def laid_out(layout, rows, tokens=3):
    """(rows, tokens, 2) numbered by sample, then kept as `layout` says."""
    x = torch.arange(rows).view(-1, 1, 1) + torch.zeros(rows, tokens, 2)
    if layout.joined == "major":
        return x.flatten(0, 1)
    if layout.joined == "minor":
        return x.transpose(0, 1).flatten(0, 1)
    return x.movedim(0, layout.dim)


@given(layout=st.sampled_from(LAYOUTS), rows=st.integers(2, 6), more=st.integers(1, 3), tokens=st.integers(2, 6))
@settings(max_examples=80, deadline=None)
def test_the_layout_is_found_and_brings_the_samples_first(layout, rows, more, tokens):
    few, many = laid_out(layout, rows, tokens), laid_out(layout, rows + more, tokens)
    found = find(few.shape, rows, many.shape, rows + more, layout.joined if layout.joined != "no" else "")
    assert found == layout
    first = found.first(many, rows + more)
    assert first.shape[0] == rows + more
    assert (first.flatten(1) == torch.arange(rows + more)[:, None]).all()


@given(rows=st.integers(1, 5), sizes=st.lists(st.integers(1, 6), max_size=3))
@settings(max_examples=40, deadline=None)
def test_what_does_not_follow_the_batch_is_a_constant(rows, sizes):
    assert find(torch.Size(sizes), rows, torch.Size(sizes), rows + 1, "") is None


@pytest.mark.parametrize(
    ("few", "more"), [((5, 3), (6, 3)), ((4, 4), (5, 5)), ((8, 2), (10, 2)), ((3, 8), (3, 10)), ((4,), (5, 1))]
)
def test_another_growth_has_no_layout(few, more):
    with pytest.raises(ValueError):
        find(torch.Size(few), 4, torch.Size(more), 5, "")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_meet_their_own_sample(layout):
    rows, x = 4, laid_out(layout, 4)
    own = [1 if dim == layout.dim else size for dim, size in enumerate(x.shape)]
    copies = torch.arange(rows).view(rows, *[1] * len(own)).expand(rows, *own)
    assert torch.equal(layout.spread(copies, x.shape, x.dim()) + torch.zeros_like(x), x)


def test_tokens_chosen_by_content_are_remembered_until_they_are_put_back():
    x = torch.randn(4, 5, 3)
    with Counting() as counting:
        chosen = x[x[..., 0] > 0]
        further = (chosen * 2).reshape(-1, 3)
        index = (x[:, 0, 0] > -9).nonzero()[:, 0]
        indexed = x[index]
        back = torch.zeros_like(x)
        back[x[..., 0] > 0] = further
        taken = x[torch.arange(4), torch.zeros(4, dtype=torch.long)]
    assert all(counting.chosen(item) for item in (chosen, further, index, indexed))
    assert not any(counting.chosen(item) for item in (x, back, taken))
