import numpy as np
import pytest

from dpfa_training.loss_owners import Coupled, Owners

SHAPES = [(3, 4, 5), (12, 5), (3, 20), (60,), (3, 2, 2, 5), (3, 1, 4, 5), (6, 10), (4, 3, 5), (12, 5, 1), (15, 4)]


def full(owners: Owners, shape: tuple[int, ...]) -> np.ndarray:
    """The row of every number."""
    rows = owners.rows.reshape([-1 if dim == owners.dim else 1 for dim in range(len(shape))])
    return np.broadcast_to(rows, shape)


@pytest.mark.parametrize("before", SHAPES)
@pytest.mark.parametrize("after", SHAPES)
def test_a_reshape_keeps_every_number_s_row_or_is_refused(before, after):
    for dim in (dim for dim, size in enumerate(before) if size > 1):
        owners = Owners(dim, np.arange(before[dim]))
        truth = full(owners, before).reshape(after)
        told = [
            d
            for d in range(len(after))
            if (np.moveaxis(truth, d, -1) == np.moveaxis(truth, d, -1).reshape(-1, after[d])[0]).all()
        ]
        try:
            found = owners.reshaped(before, after)
        except Coupled:
            assert not told
        else:
            assert (full(found, after) == truth).all()


def test_rows_that_are_split_over_two_dimensions_are_refused():
    with pytest.raises(Coupled, match="takes the rows apart"):
        Owners(0, np.arange(6)).reshaped((6, 5), (2, 3, 5))


def test_broadcasting_one_number_a_row_against_itself_is_refused():
    owners = Owners(0, np.arange(6))
    assert owners.aligned((6,), (6,)).dim == 0
    assert owners.aligned((6, 1), (6, 4)).dim == 0
    with pytest.raises(Coupled, match="every row meets every other"):
        owners.aligned((6,), (6, 6))
    with pytest.raises(Coupled, match="a result of shape"):
        owners.aligned((6, 1), (1, 1))


def test_even_counts_every_row():
    assert Owners(0, np.array([0, 1, 1, 0])).even(2)
    assert not Owners(0, np.array([0, 1, 1])).even(2)
    assert not Owners(0, np.array([0, 0])).even(2)
