from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpfa_attention.functional import released
from dpfa_attention.padded_batches import Packing, ShownKeys, packing
from dpfa_core.errors import PrivacyParameterError

MASKS = {
    "none": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
    "left": [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]],
    "both ways": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
    "inside": [[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]],
    "one row is nothing else": [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
}


def keys_of(mask: str) -> Tensor:
    return torch.tensor(MASKS[mask], dtype=torch.bool)


def through(shown: ShownKeys, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = packing(shown, shape=(q.shape[0], q.shape[1], k.shape[1]))
    terms = {"lengths": rows.lengths, "causal": shown.causal, "window_size": shown.window}
    return rows.unpacked(released(*rows.packed(q, k, v), epsilon=math.inf, delta=1e-5, **terms))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("S", [6, 2], ids=["all at once", "after a cache"])
def test_real_tokens_get_masked_attention(inputs, mask: str, causal: bool, S: int) -> None:
    q, k, v = inputs(S=S, Sk=6, Hk=2)
    keys = keys_of(mask)
    seen = keys[:, None, None].expand(2, 1, S, 6)
    if causal:
        seen = seen & torch.ones(S, 6, dtype=torch.bool).tril(6 - S)
    out = through(ShownKeys(causal, keys), q, k, v)
    moved = (x.transpose(1, 2) for x in (q, k, v))
    wanted = scaled_dot_product_attention(*moved, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    real = keys[:, 6 - S :]
    torch.testing.assert_close(out[real], wanted[real])


@pytest.mark.parametrize("mask", ["left", "both ways", "right"])
def test_a_window_counts_real_tokens(inputs, mask: str) -> None:
    q, k, v = inputs(S=6)
    keys = keys_of(mask)
    near = torch.ones(6, 6, dtype=torch.bool).tril() & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    out = through(ShownKeys(True, keys, (2, 0)), q, k, v)
    moved = (x.transpose(1, 2) for x in (q, k, v))
    wanted = scaled_dot_product_attention(*moved, attn_mask=keys[:, None, None] & near).transpose(1, 2)
    torch.testing.assert_close(out[keys], wanted[keys])


def test_padding_inside_a_row_under_a_window_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="ends of a row, got 'padding inside of row 0'"):
        packing(ShownKeys(True, keys_of("inside"), (2, 0)), shape=(2, 6, 6))


def test_packing_counts_the_real_queries_and_keys_of_each_row() -> None:
    assert packing(ShownKeys(True, keys_of("both ways")), shape=(2, 6, 6)).lengths == ((4, 4), (3, 3))
    assert packing(ShownKeys(True, keys_of("both ways")), shape=(2, 2, 6)).lengths == ((2, 4), (0, 3))
    assert packing(ShownKeys(True, keys_of("none")), shape=(2, 6, 6)) == Packing()


def test_padding_at_the_end_moves_nothing() -> None:
    rows = packing(ShownKeys(False, keys_of("right")), shape=(2, 6, 6))
    assert (rows.queries, rows.keys) == (None, None)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"must be \[batch, keys\], \(2, 5\), got \(2, 6\)"):
        packing(ShownKeys(True, keys_of("left")), shape=(2, 5, 5))


def test_more_queries_than_keys_are_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="7 queries must stand at the last of as many keys"):
        packing(ShownKeys(True, keys_of("left")), shape=(2, 7, 6))
