import torch

from dp_flash_attention.models.hashed_words import HashedWords


def test_numbers_are_the_same_everywhere() -> None:
    # The check value of CRC-32 is 0xCBF43926 for "123456789"; its last 13 bits are 6438.
    assert HashedWords(buckets=8192, length=3)(["123456789"]).tolist() == [[6439, 0, 0]]


def test_a_text_is_numbered_by_itself() -> None:
    words = HashedWords(length=8)
    texts = ["one two", "Straße, 世界 and ünïcode!", "one"]
    alone = torch.cat([words([text]) for text in texts])
    assert torch.equal(words(texts), alone)
    assert alone[0, 0] == alone[2, 0]
    assert (alone[1] > 0).sum() == 6


def test_long_texts_are_cut_and_short_ones_padded() -> None:
    numbers = HashedWords(buckets=10, length=4)(["a b c d e f", "a"])
    assert numbers.shape == (2, 4)
    assert numbers.max() <= 10
    assert (numbers[0] > 0).all()
    assert numbers[1].count_nonzero() == 1
