import pytest
import torch

from dp_flash_attention.models import recipes
from dp_flash_attention.models.recipes import Recipe
from dpfa_core.errors import PrivacyParameterError

ALL = (
    recipes.digits_recipe,
    recipes.image_recipe,
    recipes.text_recipe,
    recipes.bag_of_words_recipe,
    recipes.huggingface_recipe,
)


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("records", [1, 16, 1600, 10**6])
def test_a_batch_never_exceeds_the_records_and_work_is_bounded(recipe, records: int) -> None:
    made = recipe(records)
    assert 1 <= made.expected_batch_size <= min(records, recipes.LARGEST_BATCH)
    assert made.epochs >= 1
    assert made.epochs * records <= max(records, 90 * made.expected_batch_size)
    assert made.origin.endswith(".")


@pytest.mark.parametrize("recipe", ALL)
def test_no_records_are_refused(recipe) -> None:
    with pytest.raises(PrivacyParameterError, match="at least one training record, got 0"):
        recipe(0)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_optimiser_is_the_one_named(name: str, kind: type) -> None:
    recipe = Recipe(
        epochs=1, expected_batch_size=1, max_grad_norm=1.0, learning_rate=0.3, optimizer=name, origin="None."
    )
    made = recipe.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == 0.3
