"""What a recipe will cost, worked out before anything starts and without the network.

FLOPs count a multiply and an add as two. d = d_model, F = d_sae.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.recipe import SAE, Recipe


@dataclass(frozen=True)
class SAEPlan:
    """One SAE's cost."""

    sae: SAE
    parameters: int
    state_bytes: int
    """Parameters and Adam's two moments, float32: what training holds, and a checkpoint on disk."""
    steps: int
    flops: float
    """Of the one dense product of each step; all else is sparse and under 1% of it."""


@dataclass(frozen=True)
class Plan:
    """A recipe's cost."""

    recipe: Recipe
    d_model: int
    sequences: int
    """About: the mean chunk length is known, the draws are not made."""
    segments: int
    layer_bytes: int
    """Activations of one layer, both splits."""
    store_bytes: int
    saes: list[SAEPlan]
    disk_bytes: int
    """Stores, one checkpoint and one export for each SAE."""
    free_bytes: int


def plan(recipe: Recipe, out: Path) -> Plan:
    """Work out a recipe's cost.

    Args:
        out: where it would run; the free space of its disk is looked up.

    Raises:
        UserError: the recipe does not say `model.d_model`, and the model's config cannot be had.
    """
    d_model = recipe.model.d_model or _d_model_of_config(recipe)
    tokens = recipe.tokens.count + recipe.tokens.held_out
    mean_length = sum(low + high for low, high in recipe.tokens.chunk_lengths) / 2 / len(recipe.tokens.chunk_lengths)
    layer_bytes = tokens * recipe.activations.row_bytes(d_model)
    store_bytes = layer_bytes * len(recipe.activations.layers)
    saes = [_plan_sae(recipe, sae, d_model) for sae in recipe.saes]
    exports = sum(4 * (2 * sae.sae.d_sae * d_model) for sae in saes)
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return Plan(recipe, d_model, round(tokens / mean_length), -(-tokens // recipe.tokens.segment_rows), layer_bytes,
                store_bytes, saes, store_bytes + sum(sae.state_bytes for sae in saes) + exports,
                shutil.disk_usage(existing).free)


def _plan_sae(recipe: Recipe, sae: SAE, d_model: int) -> SAEPlan:
    tokens = recipe.tokens.count * recipe.train.epochs
    parameters = sae.d_sae * d_model + sae.d_sae + d_model
    steps = -(-recipe.tokens.count // recipe.train.batch) * recipe.train.epochs
    return SAEPlan(sae, parameters, 12 * parameters, steps, 2.0 * sae.d_sae * d_model * tokens)


def _d_model_of_config(recipe: Recipe) -> int:
    from transformers import AutoConfig

    from olmoscope.model_source import explain, locate

    try:
        config = AutoConfig.from_pretrained(**locate(recipe.model)).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"{explain(error, recipe.model)}; or give model.d_model and model.num_layers in the "
                        "recipe, then a plan needs neither") from error
    if recipe.activations.layers[-1] >= config.num_hidden_layers:
        raise UserError(f"activations.layers: layer {recipe.activations.layers[-1]} is out of range, "
                        f"{recipe.model.name} has layers 0 to {config.num_hidden_layers - 1}")
    return int(config.hidden_size)
