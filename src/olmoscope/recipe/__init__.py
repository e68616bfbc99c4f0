"""What a run is. schema.py has the models, load.py reads them from YAML."""

from olmoscope.recipe.schema import (
    Activations,
    CoderConfig,
    Evaluate,
    Filter,
    Model,
    Recipe,
    Release,
    Text,
    Tokens,
    Train,
)

SAE = CoderConfig
"""The old name of `CoderConfig`, from before it configured transcoders and crosscoders too."""

__all__ = ["SAE", "Activations", "CoderConfig", "Evaluate", "Filter", "Model", "Recipe", "Release", "Text", "Tokens",
           "Train"]
