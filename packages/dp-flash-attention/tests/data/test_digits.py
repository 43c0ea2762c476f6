import torch

from dp_flash_attention.data.digits import digits


def test_the_split_is_stratified_and_repeatable() -> None:
    first, again, other = digits(seed=0), digits(seed=0), digits(seed=1)
    assert (len(first.train), len(first.test)) == (1437, 360)
    shares = first.train.labels.bincount() / 1437 - first.test.labels.bincount() / 360
    assert shares.abs().max() < 0.003
    assert first.digest(b"k") == again.digest(b"k") != other.digest(b"k")


def test_no_digit_is_in_both_parts() -> None:
    task = digits()
    everything = torch.cat([task.train.inputs, task.test.inputs]).flatten(1)
    assert len(everything) == 1797
    assert 0 <= everything.min() <= everything.max() == 1
    train = {image.numpy().tobytes() for image in task.train.inputs}
    test = {image.numpy().tobytes() for image in task.test.inputs}
    assert not train & test


def test_who_is_private_is_declared() -> None:
    assert [source.visibility for source in digits().sources] == ["private", "public"]
