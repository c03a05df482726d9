"""Recipes: functions that return the runs of an experiment.

A recipe is a public function annotated `-> list[Run]`. Those in the modules of this package go
by their names; one of your own goes by its file:

    recallzoo run quickstart
    recallzoo run path/to/recipe.py --num-epochs 8
    recallzoo run path/to/recipes.py:small

Its parameters, each with a type and a default, are its command-line options; `Args:` in its
docstring explains them.
"""

from recallzoo.recipes._find import Found, find_recipes, recipe_names
from recallzoo.recipes._load import Parameter, Recipe, load

__all__ = ["Found", "Parameter", "Recipe", "find_recipes", "load", "recipe_names"]
