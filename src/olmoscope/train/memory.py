"""The memory, in bytes, that an SAE in training takes on its device: between steps, and at the peak of a step.

d = width of the rows, F = d_sae, B = rows of a batch (twice as many if `train.finish` adds sequences; the language
model that reads them is not counted), K = places of a row's codes.

    held    12 (F d + F + d) for parameters and Adam's moments (8 F d if the matrix's moments are bfloat16; 2 F d in
            place of F d if weights are untied), 8 F for when each latent last fired, 4 F for each matrix for when each
            row was last updated (not with `adam: exact`), 9 F for the dead latents of an auxiliary loss; with
            candidates F d for the encoder in 8 bits
    step    6 arrays [B, d] in float32, 40 B K for codes (four times as many if their number varies), and the kernels'
            own workspace; with an auxiliary loss 6 more arrays, its codes, and 4 F d (the encoder's rows of dead
            latents, if all are dead); with Matryoshka prefixes 3 more arrays and codes for each prefix; with
            `train.orthogonal`, once the rest is released, a chunk of C decoder rows: 5 arrays [C, d], 2 [C, C], 16 F

If several ranks train one SAE in shards, `held` is divided among them. Each rank has the whole arrays [B, d], and 3
more for the parts of a reconstruction that are sent and received (and 2 more for each Matryoshka prefix). Workspace and
gathered rows are those of one shard.

For several SAEs that train together, add up `held` and take the largest `step`, as they step one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

from olmoscope.kernels.interface import Kernels
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.site import Site
from olmoscope.train.activation_rules import CAP
from olmoscope.train.derived import settled
from olmoscope.train.orthogonal import chunk_rows


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of one SAE, in bytes."""

    state: int
    """Parameters and Adam's two moments: the size of a checkpoint on disk."""
    held: int
    """Memory held between steps, including `state`."""
    step: int
    """Memory needed in addition at the peak of a step."""


def training_memory(recipe: Recipe, sae: CoderConfig, width: Callable[[Site], int], kernels: Kernels,
                    ranks: int = 1) -> TrainingMemory:
    """The memory that training an SAE of a recipe takes.

    Args:
        width: gives the width of a site's rows.
        kernels: the kernels of the device on which it would be trained.
        ranks: how many ranks train it together; the result is the memory of each.
    """
    train = settled(recipe, sae)
    d_in = sum(width(site) for site in sae.reads)
    d_out = d_in if sae.writes is None else width(sae.writes[0])
    widest = max(d_in, d_out)
    batch, matrix = train.batch * (2 if train.finish else 1), sae.d_sae * widest
    biases = sae.d_sae * (2 if sae.activation == "jumprelu" else 1) + (d_in if sae.writes is None else d_in + d_out)
    if sae.skip:
        biases += d_in * d_out  # whose moments are float32, as a bias's
    moments = 2 * (2 if train.moments == "bfloat16" else 4)
    state = (4 + moments) * (sae.parameters(d_in, d_out) - biases) + 12 * biases
    updated = 0 if train.adam == "exact" else 4 * (2 if sae.weights == "untied" else 1)
    held = state + (8 + updated + (9 if train.auxiliary else 0)) * sae.d_sae
    places = sae.k * (CAP if sae.activation in ("batchtopk", "jumprelu") else 1)
    arrays, gathered = 6 if sae.writes is None else 8, 0
    if sae.matryoshka:  # u and e once more for each prefix, and another e while it is decoded
        arrays += 3 * len(sae.matryoshka) + 2
        places *= 1 + len(sae.matryoshka)
    if train.candidates:
        held += matrix + 16 * sae.d_sae
    if train.auxiliary and train.auxiliary.weight:
        arrays += 6
        places += train.auxiliary.k
        gathered = 4 * matrix
    chunks = 0
    if train.orthogonal:
        latents = -(-sae.d_sae // train.shards)
        chunk = min(chunk_rows(batch), latents)
        chunks = 4 * (5 * chunk * d_out + 2 * chunk**2) + 16 * latents
    if train.shards > 1:
        arrays += 3 + 2 * len(sae.matryoshka)
    workspace = kernels.workspace_bytes(batch, widest, -(-sae.d_sae // train.shards), places,
                                        train.candidates.margin if train.candidates else None)
    codes = 40 * batch * places * train.shards // ranks
    step = arrays * 4 * batch * widest + codes + max(gathered // train.shards + workspace, chunks)
    return TrainingMemory(state // ranks, held // ranks, step)
