import pytest
import torch
from torch import nn

from dp_flash_attention.models.vit import VisionTransformer


@pytest.mark.parametrize("shape", [(8, 1, 2), (32, 3, 4)])
def test_a_row_depends_on_its_own_image_only(shape: tuple[int, int, int]) -> None:
    side, channels, patch = shape
    torch.manual_seed(0)
    model = VisionTransformer(classes=5, side=side, channels=channels, patch=patch)
    images = torch.rand(6, channels, side, side)
    logits = model(images)
    assert logits.shape == (6, 5)
    changed = images.clone()
    changed[1:] = torch.rand(5, channels, side, side)
    torch.testing.assert_close(model(changed)[0], logits[0])
    assert not torch.allclose(model(changed)[1], logits[1])
    torch.testing.assert_close(model(images[:1])[0], logits[0])


def test_patches_are_told_apart_by_their_place() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(classes=3)
    image = torch.rand(1, 1, 8, 8)
    assert not torch.allclose(model(image), model(image.roll(2, dims=3)))


def test_every_parameter_is_one_that_private_training_knows() -> None:
    model = VisionTransformer(classes=3)
    known = (nn.Linear, nn.LayerNorm, nn.Conv2d)
    inside = {id(p) for module in model.modules() if isinstance(module, known) for p in module.parameters()}
    bare = {name: p.shape[0] for name, p in model.named_parameters() if id(p) not in inside}
    assert bare == {"positions": 1}
