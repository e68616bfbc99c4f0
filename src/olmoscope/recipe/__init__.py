"""What a run is. schema.py has the models, load.py reads them from YAML."""

from olmoscope.recipe.schema import SAE, Activations, Evaluate, Filter, Model, Recipe, Release, Text, Tokens, Train

__all__ = ["SAE", "Activations", "Evaluate", "Filter", "Model", "Recipe", "Release", "Text", "Tokens", "Train"]
