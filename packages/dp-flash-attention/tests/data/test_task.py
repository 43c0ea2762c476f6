import pytest
import torch

from dp_flash_attention.data.task import Records, Task, private_task
from dpfa_core.errors import PrivacyParameterError


def images(count: int = 4) -> torch.Tensor:
    return torch.arange(count * 4).view(count, 1, 2, 2) / (count * 4)


def task(inputs: torch.Tensor, labels: list[int]) -> Task:
    is_test = torch.tensor([True, True] + [False] * (len(labels) - 2))
    records = Records(inputs, torch.tensor(labels))
    return private_task(name="t", kind="image", classes=("a", "b"), records=records, is_test=is_test)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_non_finite_pixel_is_refused(broken: float) -> None:
    inputs = images()
    inputs[2, 0, 1, 0] = broken
    with pytest.raises(PrivacyParameterError, match=r"1 of 4 images hold NaN or infinity \(the first is number 2\)"):
        Records(inputs, torch.zeros(4, dtype=torch.int64))


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"1 of 2 are empty \(the first is number 1\)"):
        Records(("good", "  "), torch.tensor([0, 1]))


def test_records_and_labels_must_pair_up() -> None:
    with pytest.raises(PrivacyParameterError, match="got 2 records and 1 labels"):
        Records(("a", "b"), torch.tensor([0]))


def test_one_class_only_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match=r"at least two classes, got 1 \(b\)"):
        task(images(6), [0, 1, 1, 1, 1, 1])


def test_a_label_without_a_class_is_refused() -> None:
    with pytest.raises(PrivacyParameterError, match="labels from 0 to 1"):
        task(images(6), [0, 7, 1, 0, 1, 0])


def test_select_keeps_inputs_and_labels_together() -> None:
    chosen = Records(("a", "b", "c"), torch.tensor([0, 1, 2])).select(torch.tensor([2, 0]))
    assert chosen.inputs == ("c", "a")
    assert chosen.labels.tolist() == [2, 0]


def test_the_digest_depends_on_key_records_and_split_and_nothing_else() -> None:
    labels = [0, 1, 1, 0, 1, 0]
    one = task(images(6), labels)
    assert one.digest(b"key") == task(images(6), labels).digest(b"key")
    changed = images(6)
    changed[4, 0, 0, 0] += 0.5
    others = {
        one.digest(b"key"),
        one.digest(b"another key"),
        task(changed, labels).digest(b"key"),
        task(images(6), [0, 1, 1, 0, 0, 1]).digest(b"key"),
    }
    assert len(others) == 4


def test_what_is_public_about_private_records_is_stated() -> None:
    one = task(images(6), [0, 1, 1, 0, 1, 0])
    assert [source.visibility for source in one.sources] == ["private", "private"]
    said = " ".join(one.not_covered)
    assert "4 to train on, 2 to test on" in said
    assert "a, b" in said
    assert "test accuracy" in said


def test_images_and_texts_are_not_confused() -> None:
    with pytest.raises(PrivacyParameterError, match="with images, got texts"):
        _ = Records(("a",), torch.tensor([0])).images
    with pytest.raises(PrivacyParameterError, match="with texts, got images"):
        _ = Records(images(1), torch.tensor([0])).texts
