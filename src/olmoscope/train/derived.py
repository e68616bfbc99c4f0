"""The settings that a recipe leaves open, found from the SAE's width and k and the number of tokens.

A value in the recipe counts. A null is replaced here, by rules whose evidence is in docs/recipe-study.md:

- `batch`: the power of two nearest to tokens / 4000, from 256 to 4096: a few thousand steps, whatever the number of
  tokens, and no larger than it takes to fill a GPU.
- `lr`: 1.4 / (channels of the rows read), or 2 / channels with tied weights, because a step of Adam moves each entry of
  a latent's row by about the rate. With fewer than 1200 steps, this is multiplied by √(1200 / steps), where steps
  counts as at least 250.
- `decoder_rate`: 8 times `lr`. What a latent writes is easy to learn and to change; when it fires is not.
- `auxiliary.weight`: 1/8; 0 with tied weights, because the loss harms them.
- `auxiliary.k`: the SAE's own k.
- `auxiliary.dead_window`: a thirtieth of the tokens, so that there is time to revive a latent. If all latents fired
  equally often, each would fire n times in the window. The window is limited so that n is at least 16 and at most 160.
  With tied weights n is 160: they have only the lift, which does harm if it acts early.
- `auxiliary.lift`: if the window is derived here and is a share s of the longest window (n = 160), the lift is
  multiplied by s, so that biases do not rise faster. The factor is √s if each row has k active latents whatever the
  biases are (TopK, group-max), because these rules tolerate a larger lift.
"""

import math
from typing import Annotated

from pydantic import Field

from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.recipe.sources import Count
from olmoscope.recipe.training import Auxiliary, Train

STEPS = 4000
SMALLEST_BATCH, LARGEST_BATCH = 256, 4096
RATE, TIED_RATE = 1.4, 2.0
FEW_STEPS, FEWEST_STEPS = 1200, 250
"""Runs with fewer than 250 steps were not tested."""
DECODER_RATE = 8.0
WEIGHT = 1 / 8
WINDOWS = 30
FEWEST_FIRINGS, MOST_FIRINGS = 16, 160
FIXED_L0 = ("topk", "groupmax")


class SettledAuxiliary(Auxiliary):
    """`Auxiliary` with nothing left open."""

    weight: Annotated[float, Field(ge=0)] = WEIGHT
    k: Count
    dead_window: Count


class Settled(Train):
    """`Train` with nothing left open except the rate, which also depends on the rows (`rate_of`)."""

    seed: Annotated[int, Field(ge=0)]
    batch: Count
    decoder_rate: Annotated[float, Field(gt=0)]
    auxiliary: SettledAuxiliary | None


def batch_of(recipe: Recipe, train: Train) -> int:
    """Rows of a batch."""
    if train.batch is not None:
        return train.batch
    power = round(math.log2(recipe.tokens.count * train.epochs / STEPS))
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 1 << max(0, power)))


def settled(recipe: Recipe, sae: CoderConfig) -> Settled:
    """How an SAE of a recipe is trained."""
    train = recipe.train_of(sae)
    auxiliary = train.auxiliary
    decoder_rate = (train.decoder_rate or DECODER_RATE) if sae.weights == "untied" else 1.0
    if auxiliary is not None:
        fewest, most = (max(1, firings * sae.d_sae // sae.k) for firings in (FEWEST_FIRINGS, MOST_FIRINGS))
        window = most
        if sae.weights == "untied":
            window = min(most, max(fewest, recipe.tokens.count * train.epochs // WINDOWS))
        shorter = window / most
        lift = auxiliary.lift * (math.sqrt(shorter) if sae.activation in FIXED_L0 else shorter)
        weight = auxiliary.weight
        if weight is None:
            weight = WEIGHT if sae.weights == "untied" else 0.0
        auxiliary = SettledAuxiliary(weight=weight, k=auxiliary.k or sae.k,
                                     dead_window=auxiliary.dead_window or window,
                                     lift=auxiliary.lift if auxiliary.dead_window else lift)
    given = {name: getattr(train, name) for name in Train.model_fields}
    return Settled(**given | {"seed": recipe.seed if train.seed is None else train.seed,
                              "batch": batch_of(recipe, train), "decoder_rate": decoder_rate,
                              "auxiliary": auxiliary})


def rate_of(recipe: Recipe, sae: CoderConfig, width: int) -> float:
    """The learning rate with which the training of an SAE begins.

    Args:
        width: the width of the rows that it reads; for a crosscoder, the sum over its sites.
    """
    train = recipe.train_of(sae)
    if train.lr is not None:
        return train.lr
    steps = max(FEWEST_STEPS, recipe.tokens.count * train.epochs / batch_of(recipe, train))
    return (RATE if sae.weights == "untied" else TIED_RATE) / width * max(1.0, math.sqrt(FEW_STEPS / steps))
