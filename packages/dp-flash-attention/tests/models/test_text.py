import torch

from dp_flash_attention.models.text import TextTransformer


def model() -> TextTransformer:
    torch.manual_seed(0)
    made = TextTransformer(classes=3, buckets=50, length=12, hidden=16, layers=2, heads=2)
    with torch.no_grad():  # away from the start, where blocks are the identity
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.words.weight[0] = 0
    return made


def words(rows: int) -> torch.Tensor:
    made = torch.randint(1, 51, (rows, 12), generator=torch.Generator().manual_seed(1))
    made[:, 8:] = 0
    return made


def test_a_row_depends_on_its_own_words_only() -> None:
    made, rows = model(), words(4)
    logits = made(rows)
    changed = rows.clone()
    changed[1:, :3] = 7
    torch.testing.assert_close(made(changed)[0], logits[0])
    assert not torch.allclose(made(changed)[1], logits[1])


def test_padding_changes_nothing() -> None:
    made, rows = model(), words(3)
    logits = made(rows)
    with torch.no_grad():
        made.positions[:, 8:] += 5.0
    torch.testing.assert_close(made(rows), logits)


def test_the_order_of_words_counts_once_the_blocks_have_moved() -> None:
    made, rows = model(), words(1)
    assert not torch.allclose(made(rows), made(rows.roll(1, dims=1) * (rows != 0)))


def test_it_starts_as_a_sum_of_word_vectors() -> None:
    torch.manual_seed(0)
    made, rows = TextTransformer(classes=3, buckets=50, length=12, hidden=16), words(5)
    total = made.words(rows).sum(dim=1) / 8**0.5
    torch.testing.assert_close(made(rows), made.head(total))


def test_a_row_without_words_is_finite_forwards_and_backwards() -> None:
    made = model()
    rows = torch.cat([words(1), torch.zeros(1, 12, dtype=torch.int64)])
    made(rows).sum().backward()
    assert made(rows).isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
