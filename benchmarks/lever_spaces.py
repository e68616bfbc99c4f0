"""Spaces in which a lever lets an SAE be trained (levers.py). D width of the rows, N rows."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lever_step import Space
from olmoscope.activations.stream.rounds import StoreRounds
from olmoscope.model.load import pick_device
from olmoscope.model.splice import CausalLM, load_causal_lm
from olmoscope.model_source import at_revision
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.train.finish import SequenceReader, draw_steps

SHRINK = 0.01
"""This share of the mean variance is added to each variance before whitening."""
SHARE = 0.5
"""The share of the metric that comes from the model's loss; the rest is the plain squared error."""
TOKENS = 8192
"""Tokens on which the model's loss is measured."""
ROWS_AT_ONCE = 256


def whitened(x_ND: Tensor) -> Space:
    """Rows with mean 0 and, except for `SHRINK`, unit variance in all directions (symmetric whitening)."""
    mean_D = x_ND.double().mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(torch.cov(x_ND.double().T))
    scale_D = (values_D + SHRINK * values_D.mean()).rsqrt()
    return Space(mean_D.float(), ((vectors_DD * scale_D) @ vectors_DD.T).float())


def read_by_the_model(recipe: Recipe, spec: CoderConfig, rounds: StoreRounds, out: Path) -> Space:
    """Rows stretched so that ‖(x̂ − x) T‖² is half the plain square and half the expected rise of the model's loss, by
    its Fisher information at the site: T² = I/2 + D/2 · E[g gᵀ] / tr E[g gᵀ], where g is the gradient of the
    log-probability of tokens drawn from the model's predictions.

    Args:
        out: the output folder, which keeps E[g gᵀ] in a file for each site.
    """
    cache = out / "levers" / f"{spec.site}.fisher.safetensors"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        model = load_causal_lm(at_revision(recipe.model, rounds.manifest.model.revision), pick_device("cpu"))
        save_file({"fisher": _fisher(recipe, spec, rounds, model)}, cache)
    fisher_DD = load_file(cache)["fisher"].double()
    width = len(fisher_DD)
    metric_DD = (1 - SHARE) * torch.eye(width).double() + SHARE * width * fisher_DD / fisher_DD.trace()
    values_D, vectors_DD = torch.linalg.eigh(metric_DD)
    return Space(torch.zeros(width), ((vectors_DD * values_D.sqrt()) @ vectors_DD.T).float())


def _fisher(recipe: Recipe, spec: CoderConfig, rounds: StoreRounds, model: CausalLM) -> Tensor:
    reader = SequenceReader(lambda: model, spec.sites, rounds.tokens, recipe.tokens.documents == "apart")
    place, rng = reader.places[spec.site], torch.Generator().manual_seed(0)
    sums_DD = torch.zeros(rounds.manifest.width(spec.site), rounds.manifest.width(spec.site))
    for pieces in draw_steps(rounds.tokens, TOKENS // 512, 512, recipe.seed):
        for batch, reading in reader.read(pieces).passes:
            x_BTD = reading.at[spec.site]
            x_ND = x_BTD.flatten(0, 1).detach().clone().requires_grad_()
            with torch.enable_grad():
                hidden_RD = model.go_on(place, x_ND.view_as(x_BTD), reading).flatten(0, 1)[batch.real_R]
            (g_ND,) = torch.autograd.grad(hidden_RD, x_ND, _at_the_head(model, hidden_RD.detach(), rng))
            g_RD = g_ND[batch.real_R].float()
            sums_DD += g_RD.T @ g_RD
    return sums_DD


def _at_the_head(model: CausalLM, hidden_RD: Tensor, rng: torch.Generator) -> Tensor:
    """The gradient at the last hidden state for tokens drawn from the predictions."""
    found: list[Tensor] = []
    for part_RD in torch.split(hidden_RD, ROWS_AT_ONCE):
        state_RD = part_RD.clone().requires_grad_()
        with torch.enable_grad():
            logits_RV = model.logits(state_RD)
        asked_RV = logits_RV.detach().float().softmax(1)
        drawn_R1 = torch.multinomial(asked_RV, 1, generator=rng)
        asked_RV.scatter_add_(1, drawn_R1, torch.full_like(asked_RV[:, :1], -1))
        found += torch.autograd.grad(logits_RV, state_RD, asked_RV.to(logits_RV.dtype))
    return torch.cat(found)
