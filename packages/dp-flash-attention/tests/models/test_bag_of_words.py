import torch

from dp_flash_attention.models.bag_of_words import BagOfWords


def model() -> BagOfWords:
    made = BagOfWords(classes=2, buckets=9)
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_counts_are_scaled_to_length_one_and_padding_is_not_counted() -> None:
    made = model()
    counts = torch.zeros(9)
    counts[2], counts[4] = 2, 1
    torch.testing.assert_close(
        made(torch.tensor([[3, 5, 3, 0, 0]]))[0], made.head.weight @ (counts / 5**0.5) + made.head.bias
    )


def test_order_and_other_rows_do_not_matter() -> None:
    made = model()
    rows = torch.tensor([[1, 2, 3, 3], [4, 5, 0, 0], [0, 0, 0, 0]])
    logits = made(rows)
    torch.testing.assert_close(made(rows.flip(1)), logits)
    torch.testing.assert_close(made(rows[1:2])[0], logits[1])
    torch.testing.assert_close(logits[2], made.head.bias)
