"""Collection against the model's own speed, against one layer, over time, and against SAELens.

    python benchmarks/collect.py [--subject tiny|wide|olmo3-7b|olmo3-7b-narrow] [--rounds 3] [--peer] [--json FILE]
    python benchmarks/collect.py --gpu --json FILE      the rehearsal on a GPU: olmo3-7b, in bfloat16 on cuda

The following take turns in one process, on text of the Python standard library that is packed into tokens beforehand:

    bare     the model over the same batches, stopped after the deepest layer as `collect` does; nothing is kept
    four     `collect`: four layers to disk, from loading the model to the finished store
    one      `collect`: only the deepest layer
    peer     SAELens' CacheActivationsRunner, one pass for each of the four layers, over the same tokens in sequences
             of 256 (it has no other lengths); only its `run()` is timed, not the loading of the model

It reports medians over the rounds: of tokens/s, and of the ratios within a round: four/bare (bar: at least 0.90), the
time of four to that of one (at most 1.15) and four/peer (at least 3). It also reports the share of padding (at most
0.03); the peak resident memory of a new process in each quarter of `four`, with small segments so that there are many
(flat), and of a new process that runs only `bare` (the memory that torch itself keeps); and the share of `four` that
statistics take.

The subjects: `tiny`, the package's model (d 256), for which everything besides the model weighs most; `wide`, a random
Olmo3 with d 512 and 8 layers; `olmo3-7b`, the full size with random weights, layers 7, 15, 23, 31 (needs 15 GB of disk
for its weights, as much GPU memory, and 13 GB more of disk for the store); `olmo3-7b-narrow`, its 32 layers and its
batches at d 64, to try the rehearsal without a GPU.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmoscope.activations.collect.forward import batches
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.gather import SiteRows
from olmoscope.activations.store.statistics import segment_sums
from olmoscope.files import write_json
from olmoscope.model.capture import read_sites
from olmoscope.model.load import LoadedModel, load_model, pick_device
from olmoscope.progress import console
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Recipe
from olmoscope.site import Site
from olmoscope.text.standard_library import write_corpus
from olmoscope.tokens.pack import pack
from olmoscope.tokens.segments import read_token_segment
from olmoscope.tokens.tokenizer import load_tokenizer

PEER_CONTEXT = 256


@dataclass(frozen=True)
class Subject:
    """A model and how much it reads."""

    config: dict[str, Any] | None
    """Settings of an Olmo3; None: the package's tiny model."""
    dtype: str
    layers: list[int]
    tokens: int
    recipe_tokens: dict[str, Any]


def olmo3(width: int, hidden: int, heads: int, layers: int, window: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return {"vocab_size": 100278, "hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": heads, "num_hidden_layers": layers, "layer_types": kinds * (layers // 4),
            "sliding_window": window, "max_position_embeddings": 8192, "pad_token_id": 1, "eos_token_id": 0}


@dataclass(frozen=True)
class Taken:
    """The time of a piece of work."""

    seconds: float
    processor: float
    """Processor seconds of all threads of this process together."""


class Clock:
    """Measures from its creation to `taken`."""

    def __init__(self) -> None:
        _synchronize()
        self._start, self._processor = time.perf_counter(), time.process_time()

    def taken(self) -> Taken:
        _synchronize()
        return Taken(time.perf_counter() - self._start, time.process_time() - self._processor)


SHORT = {"chunk_lengths": [[48, 128], [192, 256], [448, 512]], "segment_rows": 16384, "batch_tokens": 4096}
LONG = {"chunk_lengths": [[512, 2048], [3500, 5000], [7000, 8192]], "segment_rows": 65536, "batch_tokens": 16384}
SUBJECTS = {
    "tiny": Subject(None, "bfloat16", [1, 3, 5, 7], 200_000, SHORT),
    "wide": Subject(olmo3(512, 1536, 8, 8, 128), "float32", [1, 3, 5, 7], 100_000, SHORT),
    "olmo3-7b": Subject(olmo3(4096, 11008, 32, 32, 4096), "bfloat16", [7, 15, 23, 31], 400_000, LONG),
    "olmo3-7b-narrow": Subject(olmo3(64, 172, 4, 32, 4096), "bfloat16", [7, 15, 23, 31], 100_000, LONG),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", action="append", choices=SUBJECTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="number of tokens, instead of the subject's own")
    parser.add_argument("--peer", action="store_true", help="SAELens too (must be installed)")
    parser.add_argument("--gpu", action="store_true", help="olmo3-7b on cuda")
    parser.add_argument("--folder", type=Path, help="where models and stores are kept temporarily")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console.quiet = True
    subjects = options.subject or (["olmo3-7b"] if options.gpu else ["tiny", "wide"])
    device = "cuda" if options.gpu else "cpu"
    results: dict[str, Any] = {"hardware": _hardware(device), "provenance": provenance(), "subjects": {}}
    for name in subjects:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = measure(SUBJECTS[name], device, options.tokens, options.rounds, options.peer, Path(folder))
        results["subjects"][name] = figures
        print(f"{name}: {json.dumps(figures, indent=2)}")
    if options.json:
        write_json(options.json, results)


def measure(subject: Subject, device: str, tokens: int | None, rounds: int, with_peer: bool,
            folder: Path) -> dict[str, Any]:
    """All figures of one subject."""
    write_corpus(folder / "corpus")
    four = _recipe(subject, device, tokens or subject.tokens, subject.layers, folder)
    one = _recipe(subject, device, tokens or subject.tokens, subject.layers[-1:], folder)
    index = pack(four, load_tokenizer(four.model), "train", folder / "packed")
    rows = sum(index["rows"])
    ways: dict[str, Callable[[], Taken]] = {
        "bare": lambda: time_bare(_load(four), four.activations.sites[-1], folder / "packed"),
        "four": lambda: time_collect(four, folder),
        "one": lambda: time_collect(one, folder)}
    if with_peer:
        ways["peer"] = lambda: _time_peer(four, subject, folder)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            taken = way()
            seconds[name].append(taken.seconds)
            processor[name].append(taken.processor)
        print(f"round {number + 1}: " + ", ".join(f"{name} {rows / values[-1]:,.0f} tokens/s"
                                                  for name, values in seconds.items()), flush=True)
    bytes_written = rows * four.activations.row_bytes(_width(subject)) * len(subject.layers)
    figures = {
        "tokens": rows,
        "threads": torch.get_num_threads(),
        "dtype": subject.dtype,
        "tokens_per_second": {name: round(rows / statistics.median(values)) for name, values in seconds.items()},
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "processor_seconds": {name: [round(value, 2) for value in values] for name, values in processor.items()},
        "four_over_bare": _ratios(seconds, processor, "bare", "four"),
        "time_of_four_over_one": _ratios(seconds, processor, "four", "one"),
        "padding": round(1 - rows / index["padded"], 4),
        "written_gb_per_second": round(bytes_written / statistics.median(seconds["four"]) / 1e9, 4),
        "statistics_share": round(_time_statistics(four, folder / "packed", len(index["rows"]), _width(subject))
                                  / statistics.median(seconds["four"]), 4),
        "resident_mb_by_quarter": {"four": _resident_memory(four, folder, bare=False),
                                   "bare": _resident_memory(four, folder, bare=True)},
    }
    if with_peer:
        figures["four_over_peer"] = _ratios(seconds, processor, "peer", "four")
    return figures


def _ratios(seconds: dict[str, list[float]], processor: dict[str, list[float]], above: str,
            below: str) -> dict[str, Any]:
    """Ratios within each round, by wall time and by processor time (which other programs disturb less)."""
    figures: dict[str, Any] = {}
    for name, times in (("", seconds), ("processor_", processor)):
        ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
        figures |= {f"{name}median": round(statistics.median(ratios), 3),
                    f"{name}rounds": [round(ratio, 3) for ratio in ratios]}
    return figures


def _width(subject: Subject) -> int:
    return 256 if subject.config is None else int(subject.config["hidden_size"])


def _recipe(subject: Subject, device: str, tokens: int, layers: list[int], folder: Path) -> Recipe:
    return Recipe.model_validate({
        "name": "benchmark", "device": device,
        "text": {"sources": [{"kind": "dolma", "name": "modules", "paths": [f"{folder}/corpus/dolma/*.json.gz"]}],
                 "mixture": {"modules": 1.0}},
        "tokens": {"count": tokens, "held_out": 1000, **subject.recipe_tokens},
        "model": {"name": _model(subject, device, folder), "dtype": subject.dtype},
        "activations": {"layers": layers},
        "saes": [{"layer": layers[-1], "d_sae": 64, "k": 4}],
        "train": {}, "release": {"name": "benchmark", "repo_id": "nobody/benchmark"}})


def _model(subject: Subject, device: str, folder: Path) -> str:
    """The name of the subject's model; random weights are written once, with the tiny model's tokenizer."""
    if subject.config is None:
        return "tiny"
    path = folder / "model"
    if not path.exists():
        from importlib import resources

        from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo3Config

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(Olmo3Config(**subject.config),
                                                     dtype=getattr(torch, subject.dtype))
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(str(resources.files("olmoscope") / "model" / "tiny")).save_pretrained(path)
    return str(path)


def _load(recipe: Recipe) -> LoadedModel:
    return load_model(recipe.model, recipe.activations.sites, pick_device(recipe.device))


def time_bare(model: LoadedModel, last: Site, packed: Path) -> Taken:
    """The bare forward passes over all packed tokens, stopped after the last site."""
    segments = len(list((packed / "tokens").glob("segment-*")))
    prepared = [batch.to(model.device) for segment in range(segments)
                for batch in batches(read_token_segment(packed, segment), apart=False)]
    read_sites(model.module, [model.sites.places[last]], prepared[0].token_ids_BT)
    clock = Clock()
    for batch in prepared:
        read_sites(model.module, [model.sites.places[last]], batch.token_ids_BT)
    return clock.taken()


def time_collect(recipe: Recipe, folder: Path, load: Callable[..., LoadedModel] = load_model) -> Taken:
    """The whole of `collect`, except for the packing of tokens, whose result is in `packed` of the folder.

    Args:
        load: as for `collect`.
    """
    store = _fresh_store(folder)
    clock = Clock()
    collect(recipe, "train", store, load=load)
    return clock.taken()


def _fresh_store(folder: Path) -> Path:
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    for part in ("tokens", "checksums"):
        shutil.copytree(folder / "packed" / part, store / part)
    return store


def _time_peer(recipe: Recipe, subject: Subject, folder: Path) -> Taken:
    """SAELens' runner, with a pass for each layer."""
    import logging

    import datasets
    import sae_lens

    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    stored = [read_token_segment(folder / "packed", segment).token_ids
              for segment in range(len(list((folder / "packed" / "tokens").glob("segment-*"))))]
    stream = torch.cat([torch.from_numpy(ids) for ids in stored])
    prompts = len(stream) // PEER_CONTEXT
    batch = recipe.tokens.batch_tokens // PEER_CONTEXT
    dataset = datasets.Dataset.from_dict({
        "tokens": stream[: prompts * PEER_CONTEXT].view(prompts, PEER_CONTEXT).tolist()})
    model_path = _model_path(recipe)
    seconds = processor = 0.0
    for layer in subject.layers:
        cache = folder / "peer"
        shutil.rmtree(cache, ignore_errors=True)
        runner = sae_lens.CacheActivationsRunner(sae_lens.CacheActivationsRunnerConfig(
            dataset_path="", model_name=model_path, model_class_name="AutoModelForCausalLM", model_batch_size=batch,
            hook_name=f"model.layers.{layer}", d_in=_width(subject), context_size=PEER_CONTEXT,
            training_tokens=prompts // batch * batch * PEER_CONTEXT, new_cached_activations_path=str(cache),
            shuffle=False, dtype="float32", device=recipe.device, prepend_bos=False, streaming=False,
            buffer_size_gb=0.1, model_from_pretrained_kwargs={"dtype": getattr(torch, subject.dtype)}),
            override_dataset=dataset)
        clock = Clock()
        runner.run()
        taken = clock.taken()
        seconds, processor = seconds + taken.seconds, processor + taken.processor
    return Taken(seconds, processor)


def _model_path(recipe: Recipe) -> str:
    from olmoscope.model_source import locate

    return str(locate(recipe.model)["pretrained_model_name_or_path"])


def _time_statistics(recipe: Recipe, packed: Path, segments: int, width: int) -> float:
    """Seconds to count the rows of all layers and to summarise each segment."""
    device = pick_device(recipe.device)
    seconds = 0.0
    for segment in range(segments):
        tokens = read_token_segment(packed, segment)
        rows = SiteRows(tokens.rows, width, recipe.activations.dtype, device)
        rows.start()
        positions_R = torch.arange(tokens.rows) % max(high for _, high in recipe.tokens.chunk_lengths)
        for batch in batches(tokens, apart=False):
            count = batch.rows.stop - batch.rows.start
            x_BD = torch.randn(count, width, device=device).to(getattr(torch, recipe.model.dtype))
            places_B = torch.randperm(count, device=device) + batch.rows.start
            clock = Clock()
            rows.count(places_B, x_BD)
            seconds += clock.taken().seconds
        if device.type == "cpu":  # on a GPU this runs in the background, on the CPU
            clock = Clock()
            segment_sums(Site(0), rows, positions_R, None)
            seconds += clock.taken().seconds
    return seconds * len(recipe.activations.sites)


def _resident_memory(recipe: Recipe, folder: Path, bare: bool) -> list[float]:
    """Peak resident memory (MB), in each quarter of the run, of a new process that collects or only runs the model."""
    longest = max(high for _, high in recipe.tokens.chunk_lengths)
    tokens = recipe.tokens.model_copy(update={"segment_rows": max(longest, recipe.tokens.batch_tokens)})
    recipe = recipe.model_copy(update={"tokens": tokens})
    store = folder / f"memory-{bare}"
    pack(recipe, load_tokenizer(recipe.model), "train", store)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_watch, args=(recipe.to_yaml(), str(store), bare, sender))
    process.start()
    peaks = receiver.recv()
    process.join()
    return list(peaks)


def _run_and_watch(recipe_yaml: str, folder: str, bare: bool, sender: Any) -> None:
    import yaml

    console.quiet = True
    recipe, store = Recipe.model_validate(yaml.safe_load(recipe_yaml)), Path(folder)
    total = len(list((store / "tokens").glob("segment-*")))
    peaks = [0.0] * 4
    run = 0
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            quarter = 4 * (run if bare else len(list((store / "checksums").glob("segment-*")))) // total
            peaks[min(quarter, 3)] = max(peaks[min(quarter, 3)], _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    if bare:
        model = load_model(recipe.model, recipe.activations.sites, pick_device(recipe.device))
        for run in range(total):
            for batch in batches(read_token_segment(store, run), apart=False):
                read_sites(model.module, [model.sites.places[recipe.activations.sites[-1]]],
                                     batch.to(model.device).token_ids_BT)
    else:
        collect(recipe, "train", store)
    done.set()
    thread.join()
    sender.send(peaks)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
