"""The models of the main job, how they start, and what they are compared with."""

from dp_flash_attention.models.recipes import Recipe
from dp_flash_attention.models.starting_point import StartingPoint, bag_of_words, starting_point

__all__ = ["Recipe", "StartingPoint", "bag_of_words", "starting_point"]
