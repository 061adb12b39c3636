"""From a recipe's text to a `Recipe` (checked, no model needed) and on to a `Plan` (checked against the model)."""

from a1q.recipe.load import find_recipe, load_recipe, shipped_recipes
from a1q.recipe.recipe import Recipe, StageSpec

__all__ = ["Recipe", "StageSpec", "find_recipe", "load_recipe", "shipped_recipes"]
