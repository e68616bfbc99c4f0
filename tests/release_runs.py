"""Pipeline output folders made by hand: real SAEs and checkpoints, with the files of other stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.sae.normalize import normalize_rows
from olmoscope.site import PARTS, Site
from olmoscope.train.adam import Adam
from olmoscope.train.checkpoint import save_checkpoint
from olmoscope.train.ends import ends_of
from olmoscope.train.initialize import initialize, initialize_transcoder
from olmoscope.train.step import Step

SAES = "[{layer: 3, d_sae: 96, k: 4, canonical: true}, {layer: 7, d_sae: 96, k: 4, normalize: layer_norm}]"
RAW, LAYER_NORM = "layer_03/width_96/topk_4_raw", "layer_07/width_96/topk_4_layernorm"
WIDTH = 32


def synthetic_rows(d_model: int, rows: int = 512, seed: int = 1) -> Tensor:
    """Activation-like rows `[rows, D]`: far from the origin, with some strong directions."""
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.linspace(0.2, 3, d_model)
    return torch.randn(rows, d_model, generator=generator) * spread_D + 2 * torch.randn(d_model, generator=generator)


def recipe_for_tests(saes: str = SAES, **overrides: str) -> Recipe:
    texts = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    sites = [] if "activations__sites" in overrides else ["activations.layers=[3, 7]"]
    return load_recipe("tiny", overrides=[f"saes={saes}", *sites, "model.dtype=bfloat16", *texts])


def evaluation(sae: CoderConfig, run_hash: str, d_model: int) -> dict[str, Any]:
    """An evaluation.json with every key, with invented figures."""
    return {
        "format": "olmoscope evaluation", "version": 1, "sae": sae.id, "run_hash": run_hash, "identity": "0123",
        "store": "4567", "model": "tiny", "model_revision": "sha256:0123", "site": str(sae.site),
        "architecture": "topk",
        "d_model": d_model, "d_sae": sae.d_sae, "k": sae.k, "normalize": sae.normalize,
        "text": {"kind": "store", "name": "test, held out", "tokens_hash": "89ab", "documents": 12, "resampled": 12,
                 "first_positions": 1, "outlier_norm": 50.0, "mean_of": "the held-out rows"},
        "rows": 512, "nmse": 0.2, "fvu": 0.3, "explained_variance": 0.7, "nmse_random_directions": 0.8, "cosine": 0.9,
        "l2_ratio": 0.95, "relative_reconstruction_bias": 0.98, "l1": 5.0,
        "l0": {"mean": 3.9, "p5": 3, "p25": 4, "p50": 4, "p75": 4, "p95": 4, "values": [3, 4], "rows": [51, 461]},
        "dead": {"share": 0.03125, "window": 512},
        "density": {"bin_edges": [0.0, 0.01, 0.1, 1.0], "latents": [3, 90, 3], "over_1_percent": 0.96875,
                    "over_10_percent": 0.03125},
        "intervals": {"nmse": [0.19, 0.21]},
        "language": {"rows": 512, "predictions": 500, "ce_clean": 3.0, "ce_spliced": 3.25, "ce_zero": 8.0,
                     "ce_mean": 7.0, "delta_ce": 0.25, "loss_recovered_zero": 0.95, "loss_recovered_mean": 0.9375,
                     "kl": 0.125, "kl_zero": 5.0, "kl_mean": 4.0, "intervals": {"delta_ce": [0.2, 0.3]}},
        "dictionary": {"latents": 96, "mean": 0.3, "p50": 0.3, "p95": 0.5, "largest": 0.6, "over_90_percent": 0.0,
                       "bin_edges": [0.0, 0.5, 1.0], "counts": [90, 6]},
        "by_position": [{"first": 0, "last": 0, "rows": 12, "norm": 40.0, "nmse": 0.1},
                        {"first": 1, "last": 1, "rows": 500, "norm": 20.0, "nmse": 0.2}],
        "by_norm": [{"low": 10.0, "high": 50.0, "rows": 512, "nmse": 0.2, "share_of_error": 1.0,
                     "share_of_variance": 1.0}],
        "subsets": {},
    }


MODULES = {"": ("", "output"), "mid": (".mlp", "input"), "attn.in": (".self_attn", "input"),
           "attn.out": (".post_attention_layernorm", "output"), "mlp.in": (".mlp", "input"),
           "mlp.out": (".post_feedforward_layernorm", "output")}
"""For an Olmo 3 model, the module in a layer at which each part's site is."""


def site_rows(site: Site, d_model: int, rows: int = 512) -> Tensor:
    """Rows of a site, different for each site."""
    return synthetic_rows(d_model, rows, seed=1 + PARTS.index(site.part))


def make_run(run: Path, recipe: Recipe, number: int, x_BD: Tensor, steps: int = 8,
             written_BD: Tensor | None = None) -> None:
    """A finished run of the recipe's `number`-th SAE, trained for a few steps on `x_BD`; `written_BD` is the target of
    a transcoder."""
    sae = recipe.saes[number]
    mean_D = normalize_rows(x_BD, sae.normalize)[0].mean(dim=0)
    if written_BD is None:
        ends = None
        fresh = initialize(x_BD.shape[1], sae.d_sae, sae.k, sae.normalize, mean_D, seed=number,
                           tied=sae.weights == "tied")
    else:
        ends = ends_of(sae, dict.fromkeys(sae.reads, x_BD.shape[1]), [0.5])
        fresh = initialize_transcoder(sae.d_sae, sae.k, 0.5 * mean_D, written_BD.mean(dim=0), number, sae.id,
                                      skip=sae.skip)
        x_BD = 0.5 * x_BD
    step = Step(fresh, Adam((0.9, 0.999), 1e-8), activation=sae.activation, matryoshka=sae.matryoshka)
    for _ in range(steps):
        step(x_BD, 1e-3, written_BD)
    (run / "checkpoints").mkdir(parents=True)
    save_checkpoint(run / "checkpoints" / f"step-{steps:08d}.safetensors", step, {}, ends)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "training.log").write_text("8 steps\n")
    model = {"name": "tiny", "revision": "sha256:0123", "architecture": "Olmo3ForCausalLM", "d_model": x_BD.shape[1],
             "num_layers": 8, "layers_path": "model.layers"}
    done = {"sae": sae.id, "run_hash": recipe.run_hash(sae), "checkpoint": f"checkpoints/step-{steps:08d}.safetensors",
            "steps": steps, "tokens": steps * len(x_BD), "nmse": 0.25, "l0": 3.875, "dead_share": 0.0625,
            "dead_window": 1000, "seconds": 1.0,
            "store": {"model": model, "sources": {"modules": {"documents": 30, "tokens": 3000},
                                                  "questions": {"documents": 10, "tokens": 1000}}},
            "provenance": {"olmoscope": "0.1.0", "commit": None, "date": "2026-01-01T00:00:00+00:00"}}
    if any(not site.is_layer_output for site in sae.sites):
        places = [MODULES[site.part] for site in sae.sites]
        done["store"] |= {"sites": list(map(str, sae.sites)), "widths": [x_BD.shape[1] for _ in sae.sites], "modules": [
            {"path": f"model.layers.{site.layer}{path}", "end": end, "scale": 1.0}
            for site, (path, end) in zip(sae.sites, places, strict=True)]}
    (run / "done.json").write_text(json.dumps(done))
    (run / "evaluation.json").write_text(json.dumps(evaluation(sae, done["run_hash"], x_BD.shape[1])))


def make_out(out: Path, recipe: Recipe | None = None, d_model: int = WIDTH) -> Path:
    """The output folder of a whole pipeline, up to evaluation."""
    recipe = recipe or recipe_for_tests()
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml())
    for number, sae in enumerate(recipe.saes):
        rows = synthetic_rows(d_model) if sae.site.is_layer_output else site_rows(sae.reads[0], d_model)
        written = site_rows(sae.writes[0], d_model) if sae.writes else None
        make_run(out / "runs" / sae.id, recipe, number, rows, written_BD=written)
    return out


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file by writing a new file, as all our writers do."""
    tree = json.loads(path.read_text())
    change(tree)
    path.unlink()
    path.write_text(json.dumps(tree))
