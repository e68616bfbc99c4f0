"""GPU day: collection from a model of Olmo 3's full size: four layers to disk, against the bare forward passes.

The model (7B, bfloat16) has random weights, made on the device: nothing is downloaded, and loading is not timed. It
reads Python's standard library, in turns: *bare*, only the passes, stopped after the deepest layer; *four*, all of
`collect` except for the packing of tokens, storing layers 7, 15, 23 and 31. Then the same with `model.compile`. For
comparison, the rate of the disk alone with one file, written and synced.
"""

import os
import statistics
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from collect import SHORT, SUBJECTS, Subject, olmo3, time_bare, time_collect
from gpu_part import Part
from olmoscope.model.layers import find_layers
from olmoscope.model.load import LoadedModel, compile_layers
from olmoscope.model.probe import probe
from olmoscope.model.sites import find_sites
from olmoscope.progress import console
from olmoscope.recipe.schema import Recipe
from olmoscope.site import Site
from olmoscope.tokens.pack import pack
from olmoscope.tokens.tokenizer import load_tokenizer

FULL = replace(SUBJECTS["olmo3-7b"], tokens=300_000)
SMALL = Subject(olmo3(64, 172, 4, 4, 128), "float32", [0, 1, 2, 3], 3000, SHORT)
ROUNDS = 2
BAR = 0.90


def main() -> None:
    part = Part("collect", __doc__)
    console.quiet = True
    subject = SMALL if part.small else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(part, subject)
        index = pack(recipe, load_tokenizer(recipe.model), "train", folder / "packed")
        rows, disk = sum(index["rows"]), disk_rate(folder, 2**23 if part.small else 2**31)
        part.keep(f"the disk alone: {disk / 1e9:.2f} GB/s", tokens=rows, disk_bytes_per_s=disk)
        start = time.monotonic()
        model = random_model(part, subject)
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        part.keep(f"a model of {parameters / 1e9:.2f}B parameters, made in {time.monotonic() - start:.1f} s",
                  parameters=parameters, layers=subject.layers)
        time_bare(model, recipe.activations.sites[-1], folder / "packed")  # warms up
        measure(part, recipe, model, folder, rows, "eager")
        if not part.cuda:
            return  # on a CPU, compiling takes longer than the rest of a rehearsal
        start = time.monotonic()
        compile_layers(model.layers, model.device, model.sites)
        time_bare(model, recipe.activations.sites[-1], folder / "packed")
        part.keep(f"compiled, and warmed up, in {time.monotonic() - start:.1f} s")
        measure(part, recipe, model, folder, rows, "compiled")


def measure(part: Part, recipe: Recipe, model: LoadedModel, folder: Path, rows: int, name: str) -> None:
    """Both ways in turn, round after round."""
    stored = rows * recipe.activations.row_bytes(model.d_model) * len(recipe.activations.sites)
    seconds: dict[str, list[float]] = {"bare": [], "four": []}
    for number in range(1 if part.small else ROUNDS):
        seconds["bare"].append(time_bare(model, recipe.activations.sites[-1], folder / "packed").seconds)
        seconds["four"].append(time_collect(recipe, folder, load=lambda *_: model).seconds)
        share = statistics.median(bare / four for bare, four in zip(seconds["bare"], seconds["four"], strict=True))
        rate = {name: rows / statistics.median(values) for name, values in seconds.items()}
        written = stored / statistics.median(seconds["four"])
        part.keep(f"{name}, round {number + 1}: bare {rows / seconds['bare'][-1]:,.0f} tokens/s, four layers to disk "
                  f"{rows / seconds['four'][-1]:,.0f} tokens/s",
                  **{name: {"seconds": seconds, "tokens_per_s": rate, "four_over_bare": share,
                            "written_bytes_per_s": written,
                            "peak_bytes": torch.cuda.max_memory_allocated() if part.cuda else None}})
    bar = "" if part.small else f" (bar {BAR:.2f} {'met' if share >= BAR else 'NOT MET'})"
    part.keep(f"{name}: collection runs at {share:.2f} of the bare forward{bar} and writes {written / 1e9:.2f} GB/s")


def recipe_of(part: Part, subject: Subject) -> Recipe:
    """Collection of the subject's layers; the tiny model gives the tokenizer."""
    return Recipe.model_validate({
        "name": "gpu-day", "device": part.device.type,
        "text": {"sources": [{"kind": "files", "name": "modules", "paths": [f"{sysconfig.get_path('stdlib')}/*.py"]}],
                 "mixture": {"modules": 1.0}},
        "tokens": {"count": subject.tokens, "held_out": 1000, **subject.recipe_tokens},
        "model": {"name": "tiny", "dtype": subject.dtype}, "activations": {"layers": subject.layers},
        "saes": [{"layer": subject.layers[-1], "d_sae": 64, "k": 4}],
        "train": {}, "release": {"name": "gpu-day", "repo_id": "nobody/gpu-day"}})


def random_model(part: Part, subject: Subject) -> LoadedModel:
    """A decoder with random weights, made on the device where it will run."""
    from transformers import AutoModel, Olmo3Config

    assert subject.config is not None
    config: Any = Olmo3Config(**subject.config)
    torch.manual_seed(0)
    with part.device:
        module = AutoModel.from_config(config, dtype=getattr(torch, subject.dtype)).eval().requires_grad_(False)
    path, layers = find_layers(module, config.num_hidden_layers)
    return LoadedModel("random", module, layers, "random weights", "Olmo3ForCausalLM", config.hidden_size,
                       config.num_hidden_layers, f"{module.base_model_prefix}.{path}", config.vocab_size,
                       probe(module, layers, "random", config.hidden_size, config.vocab_size, None),
                       find_sites(module, layers, [Site(layer) for layer in subject.layers], "random",
                                  config.hidden_size, config.vocab_size))


def disk_rate(folder: Path, size: int) -> float:
    """Bytes per second for one file of random numbers, written and synced."""
    content = torch.randint(-2**63, 2**63 - 1, (size // 8,)).numpy().data
    start = time.monotonic()
    with (folder / "disk").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - start
    (folder / "disk").unlink()
    return size / seconds


if __name__ == "__main__":
    main()
