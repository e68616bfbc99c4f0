"""The cost of an index compared with encoding alone, in time and bytes, and the speed of reading it.

    python benchmarks/index.py [--json FILE] [--folder FOLDER] [--threads N] [--rounds N] [--rows N] [--d-sae F] [--k K]

A random Olmo3 model of one layer (d 384, the tiny model's tokenizer) reads Python's standard library into a store; a
random SAE with unit rows, centred on the data, is indexed over it. In turns, round after round:

    encode     every row is read from the store and encoded, and nothing else: an index needs at least this
    index      `olmoscope index` from start to manifest, including the model's unembedding, neighbours, promoted tokens,
               checksums and synced files; its stages are timed inside it

Ratios are taken within a round; the medians over rounds are reported. Bytes are per firing (a latent on a row): of the
sorted firings that are on disk while the index is made, and of the finished index. Then reading: `feature(i)` with all
windows of its examples, for random features, from a newly opened index; and the list of 131072 features, made by
repeating the index's own lines.
"""

import argparse
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.reader import Store, open_store
from olmoscope.features import build
from olmoscope.features.build import IndexedText, build_index
from olmoscope.features.format import Options
from olmoscope.features.read import FeatureIndex
from olmoscope.features.sorted_firings import ROWS_AT_ONCE
from olmoscope.features.table import Filters, Table
from olmoscope.files import write_json
from olmoscope.model_source import locate
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Filter, Model, Recipe
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site
from olmoscope.text.standard_library import write_corpus
from olmoscope.train.initialize import initialize

LIST_LINES = 131072


def make_store(folder: Path, rows: int, d_model: int) -> tuple[Store, Model]:
    """A store of a random model over real text, and the model."""
    write_corpus(folder / "corpus")
    config = transformers.Olmo3Config(vocab_size=4096, hidden_size=d_model, intermediate_size=2 * d_model,
                                      num_hidden_layers=1, num_attention_heads=4, layer_types=["full_attention"],
                                      pad_token_id=1, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tiny = locate(Model(name="tiny"))["pretrained_model_name_or_path"]
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "model")
    recipe = Recipe.model_validate({
        "name": "benchmark", "device": "cpu",
        "text": {"sources": [{"kind": "dolma", "name": "modules", "paths": [f"{folder}/corpus/dolma/*.json.gz"]}],
                 "mixture": {"modules": 1.0}, "held_out_share": 0.0},
        "tokens": {"count": rows, "held_out": 1, "chunk_lengths": [(256, 512)], "segment_rows": 65536},
        "model": {"name": str(folder / "model"), "dtype": "float32"}, "activations": {"layers": [0]},
        "saes": [{"layer": 0, "d_sae": 8, "k": 1}], "train": {}, "release": {"name": "none", "repo_id": "none/none"}})
    return open_store(collect(recipe, "train", folder / "store").store), recipe.model


def encode_all(sae: SparseCoder, store: Store) -> None:
    for segment, rows in enumerate(store.segment_rows):
        for start in range(0, rows, ROWS_AT_ONCE):
            sae.encode(store.read(Site(0), segment, slice(start, min(rows, start + ROWS_AT_ONCE))))


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def worked(function: Callable[[], Any]) -> dict[str, float]:
    """Wall seconds and processor seconds: on a busy machine only the latter can be trusted."""
    start = time.process_time()
    seconds = timed(function)
    return {"seconds": seconds, "cpu_seconds": time.process_time() - start}


class Stages:
    """Total seconds in the functions of the stages, and the size of the sorted firings when all are written."""

    NAMES = ("_load_unembedding", "corpus_of", "write_corpus", "write_sorted_firings", "gather_facts", "make_parts",
             "write_listing", "_files")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spilled = 0
        for name in self.NAMES:
            setattr(build, name, self._wrap(name, getattr(build, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if name == "write_sorted_firings":
                self.spilled = size(arguments[2])
            return result

        return timed_function


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, rows: int, d_model: int, d_sae: int, k: int, rounds: int) -> dict[str, Any]:
    store, model = make_store(folder, rows, d_model)
    sae = initialize(d_model, d_sae, k, "none", store.sample_mean(Site(0), "none"), seed=0)
    subject = Opened(sae.at([Site(0)]), "random", model.name, None, "topk", folder, "folder", "random", "no", None,
                     sae.W_dec.dtype, {})
    text = IndexedText({"recipe_hash": store.manifest.recipe_hash, "split": "train"}, lambda _: store)
    stages = Stages()
    out = folder / "index"

    def index() -> None:
        build_index(subject, str(folder), text, model, out, Filter(), Options(), torch.device("cpu"))

    timed(encode_all, sae, store)  # compiles the kernels and fills the page cache
    timed(index)
    results = []
    for _ in range(rounds):
        shutil.rmtree(out)
        stages.seconds = {}
        encode, whole = worked(lambda: encode_all(sae, store)), worked(index)
        ratios = {f"ratio_{name}": whole[name] / encode[name] for name in encode}
        results.append({"encode": encode, "index": whole, **ratios, "stages": stages.seconds})
        print(f"encode {encode}, index {whole}: {ratios}; "
              + ", ".join(f"{name} {value:.2f}" for name, value in stages.seconds.items()), flush=True)
    opened = FeatureIndex(out)
    firings = opened.info.firings
    over = [(one["index"]["cpu_seconds"] - one["encode"]["cpu_seconds"]) / firings * 1e9 for one in results]
    return {"rows": store.rows, "d_model": d_model, "d_sae": d_sae, "k": k, "firings": firings,
            "dead": opened.info.dead, "rounds": results,
            "ratio": {name: statistics.median(one[f"ratio_{name}"] for one in results)
                      for name in ("seconds", "cpu_seconds")},
            "cpu_ns_per_firing_over_encoding": statistics.median(over),
            "bytes_per_firing": {"spilled": stages.spilled / firings, "index": size(out) / firings},
            "read": read(out), "list": read_list(folder, out)}


def read(out: Path) -> dict[str, float]:
    """Milliseconds for a feature and all its windows; the vocabulary is read with the first one."""
    start = time.perf_counter()
    index = FeatureIndex(out)
    index.tokens  # noqa: B018
    opened = time.perf_counter() - start
    features, windows = [], []
    for number in np.random.default_rng(0).integers(0, index.info.sae.d_sae, 1000).tolist():
        start = time.perf_counter()
        feature = index.feature(number)
        read_at = time.perf_counter()
        examples = feature.top + feature.random + [one for part in feature.intervals for one in part.examples]
        for example in examples:
            index.window(example)
        windows.append((time.perf_counter() - read_at) * 1e3 / max(1, len(examples)))
        features.append((read_at - start) * 1e3)
    quantiles = np.quantile(features, [0.5, 0.99, 1])
    return {"open_ms": opened * 1e3, "feature_ms_p50": float(quantiles[0]), "feature_ms_p99": float(quantiles[1]),
            "feature_ms_max": float(quantiles[2]), "window_ms_p50": float(np.median(windows))}


def read_list(folder: Path, out: Path) -> dict[str, float]:
    """Milliseconds for a page of 50 lines of a list of 131072."""
    lines = pq.read_table(out / "features.parquet")
    chosen = np.random.default_rng(0).integers(0, len(lines), LIST_LINES)
    many = lines.take(chosen).set_column(0, "feature", pa.array(np.arange(LIST_LINES, dtype=np.int32)))
    pq.write_table(many, folder / "list.parquet")
    opened = timed(Table, folder / "list.parquet")
    table = Table(folder / "list.parquet")
    ways: dict[str, Callable[[], Any]] = {
        "sorted": lambda: table.page("max"),
        "deep": lambda: table.page("density", offset=100_000),
        "filtered": lambda: table.page("mean", filters=Filters(dead=False, min_density=1e-4, besides=range(1000))),
        "searched": lambda: table.page("density", search="sel"),
        "order": lambda: table.order("max")}
    return {"open_ms": opened * 1e3} | {
        name: statistics.median(timed(way) for _ in range(15)) * 1e3 for name, way in ways.items()}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['rows']:,} rows, d {result['d_model']}, {result['d_sae']} latents, k {result['k']}: "
          f"{result['firings']:,} firings, {result['dead']} latents dead")
    for name, ratio in result["ratio"].items():
        print(f"index / encode, {name}: {ratio:.3f} ("
              + ", ".join(format(one[f"ratio_{name}"], ".3f") for one in result["rounds"]) + ")")
    print(f"{result['cpu_ns_per_firing_over_encoding']:.0f} ns of processor time per firing on top of encoding")
    print("bytes per firing:", {name: round(value, 2) for name, value in result["bytes_per_firing"].items()})
    print("ms to read:", {name: round(value, 3) for name, value in result["read"].items()})
    print("ms of the list:", {name: round(value, 1) for name, value in result["list"].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, default=Path("index_benchmark"))
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2**18)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=12288)
    parser.add_argument("--k", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        result = measure(arguments.folder, arguments.rows, arguments.d_model, arguments.d_sae, arguments.k,
                         arguments.rounds)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                         "torch_threads": torch.get_num_threads()}
    result["provenance"] = provenance()
    show(result)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
