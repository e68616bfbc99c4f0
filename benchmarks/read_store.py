"""The speed of shuffled reading, how well it mixes, and its memory.

    python benchmarks/read_store.py [--json FILE] [--folder FOLDER] [--saelens] [--runs N]

The project's own writer writes a synthetic store into FOLDER (6.4 GB at the default size, deleted afterwards): 384
segments of 2048 rows of width 4096 in bf16, from 3072 contexts of 256 rows. So a round reads slices of 1 or 2 blocks of
2 MB from each of 384 files, as it does from 305 files with a full-size store of 20M rows. Then these take turns within
one run:

    front to back   every file of the layer from its first byte to its last, into new batches of 4096 rows: the limit of
                    the machine. Nothing is checked or mixed.
    same memory     the same, always into one batch's memory: even cheaper, though no trainer could use it
    shuffled        an epoch of olmoscope's stream: every block checked, rows of all segments mixed
    shuffled, 1 of 2  the same for one of two readers, which takes half of each batch (only its own rows count)

warm: the files are in the page cache; cold: they were dropped from it just before (POSIX_FADV_DONTNEED). Ratios are of
medians. Contexts per batch are counted in the batches themselves (each row contains the number of its context). SAELens
reads a cache in its own format (float32, its default) with the same contexts, with its default buffer and with a buffer
of 131072 rows, the size of olmoscope's round.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoscope.activations.store.format import (
    Manifest,
    ModelIdentity,
    SourceCount,
    stored_order,
    write_manifest,
    write_segment,
)
from olmoscope.activations.store.reader import Store, open_store
from olmoscope.activations.stream.batches import Stream
from olmoscope.activations.stream.filters import keep_of_store
from olmoscope.activations.stream.rounds import READERS, StoreRounds
from olmoscope.files import write_json
from olmoscope.provenance import provenance
from olmoscope.recipe.schema import Filter
from olmoscope.site import Site

SITE, BATCH, CONTEXT = Site(7), 4096, 256
Ways = dict[str, Callable[[], Iterator[Tensor]]]
"""Ways to read, by name."""


def make_store(folder: Path, segments: int, segment_rows: int, d_model: int) -> Store:
    """A store of noise; the first two columns a, b of a row give the number of its context: 128 a + b."""
    noise_RD = torch.randn(segment_rows, d_model).bfloat16()
    contexts = segment_rows // CONTEXT
    for segment in range(segments):
        number = segment * contexts + torch.arange(contexts).repeat_interleave(CONTEXT)
        rows_RD = noise_RD.roll(segment, 0)
        rows_RD[:, 0], rows_RD[:, 1] = number // 128, number % 128
        facts = {"token_id": number.int(), "sequence": number.int(),
                 "position": torch.arange(CONTEXT).repeat(contexts).int(),
                 "source": torch.zeros(segment_rows, dtype=torch.uint8)}
        order = torch.from_numpy(stored_order(0, segment, segment_rows))
        write_segment(folder, segment, {SITE.folder: {"activations": rows_RD[order]},
                                        "rows": {name: tensor[order] for name, tensor in facts.items()}})
    rows = segments * segment_rows
    write_json(folder / "tokens" / "index.json", {"rows": [segment_rows] * segments})
    write_manifest(folder, Manifest(
        model=ModelIdentity(name="noise", revision="0", architecture="none", d_model=d_model, num_layers=8,
                            layers_path="layers"),
        tokenizer_hash="", special_token_ids=[], recipe_hash="", split="train", sites=[SITE], widths=[d_model],
        dtype="bfloat16",
        segments=segments, rows=rows, sources={"noise": SourceCount(documents=1, tokens=rows)}, finished=True,
        provenance={}))
    return open_store(folder)


def front_to_back(paths: list[Path], d_model: int, fresh: bool) -> Iterator[Tensor]:
    """Batches of rows in the order of the files, read with as few copies as possible."""
    row = 2 * d_model
    batch_BD = torch.empty(BATCH, d_model, dtype=torch.bfloat16)
    filled = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            while got := file.readinto(batch_BD.view(-1).view(torch.uint8).numpy().data[filled:]):
                filled += got
                if filled == BATCH * row:
                    yield batch_BD
                    filled = 0
                    batch_BD = torch.empty_like(batch_BD) if fresh else batch_BD


def shuffled(stream: Stream) -> Iterator[Tensor]:
    """The next epoch of a stream."""
    for _ in range(stream.batches):
        yield stream.next_batch()[SITE]


def open_stream(store: Store, epochs: int, reader: tuple[int, int] = (0, 1)) -> Stream:
    return Stream(StoreRounds(store, [SITE], "shuffled", 0, keep_of_store(Filter(), store, [])), BATCH, epochs, reader)


def seconds_per_row(batches: Iterator[Tensor]) -> float:
    """Seconds per row, for reading to the end."""
    began, rows = time.perf_counter(), 0
    for batch_BD in batches:
        rows += len(batch_BD)
    return (time.perf_counter() - began) / rows


def contexts(batches: Iterator[Tensor]) -> list[int]:
    """Number of distinct contexts in each full batch."""
    return [len((batch_BD[:, 0].float() * 128 + batch_BD[:, 1].float()).unique()) for batch_BD in batches
            if len(batch_BD) == BATCH]


def drop(paths: list[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def own_memory() -> int:
    """Bytes of memory that are this process's own (not files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def alternate(ways: Ways, runs: int, before: Callable[[], None]) -> dict[str, list[float]]:
    """Rows per second of each way, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            before()
            rates[name].append(1 / seconds_per_row(way()))
    return rates


def saelens_store(folder: Path, d_model: int, rows: int, buffer_rows: int | None) -> Iterator[Tensor]:
    """SAELens' activation store over a cache of `rows` rows, one pass."""
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens.hook_points import HookedRootModule

    store = ActivationsStore(
        model=HookedRootModule(), dataset=None, streaming=False, hook_name="hook", hook_head_index=None,
        context_size=CONTEXT, d_in=d_model, n_batches_in_buffer=buffer_rows // CONTEXT if buffer_rows else 20,
        total_training_tokens=rows, store_batch_size_prompts=32, train_batch_size_tokens=BATCH, prepend_bos=False,
        normalize_activations="none", device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder))
    for _ in range(rows // BATCH):
        yield next(store)


def make_saelens_cache(folder: Path, d_model: int, rows: int) -> None:
    """Write the output of its CacheActivationsRunner: one record per context, `[context, d_model]` float32."""
    from datasets import Array2D, Dataset, Features, concatenate_datasets

    features = Features({"hook": Array2D((CONTEXT, d_model), "float32")})
    noise_CTD = torch.randn(32, CONTEXT, d_model)
    shards = []
    for start in range(0, rows // CONTEXT, 32):
        number = torch.arange(start, start + 32).unsqueeze(1)
        noise_CTD[:, :, 0], noise_CTD[:, :, 1] = number // 128, number % 128
        Dataset.from_dict({"hook": noise_CTD.numpy()}, features=features).save_to_disk(f"{folder}-{start}")
        shards.append(Dataset.load_from_disk(f"{folder}-{start}"))
    concatenate_datasets(shards).save_to_disk(folder, num_shards=len(shards))
    for start in range(0, rows // CONTEXT, 32):
        shutil.rmtree(f"{folder}-{start}")


def measure_warm(store: Store, paths: list[Path], runs: int) -> dict[str, list[float]]:
    """Rows per second of each way, from the page cache; the streams continue from epoch to epoch, as in training."""
    whole, half = open_stream(store, 10**6), open_stream(store, 10**6, (0, 2))
    d_model = store.manifest.model.d_model
    ways: Ways = {
        "front to back": lambda: front_to_back(paths, d_model, fresh=True),
        "same memory": lambda: front_to_back(paths, d_model, fresh=False),
        "shuffled": lambda: shuffled(whole),
        "shuffled, 1 of 2": lambda: shuffled(half)}
    for way in ways.values():
        seconds_per_row(way())  # warms the cache, and lets the streams allocate their memory
    rates = alternate(ways, runs, lambda: None)
    whole.close()
    half.close()
    return rates


def measure(folder: Path, segments: int, segment_rows: int, d_model: int, runs: int) -> dict[str, Any]:
    """All measurements except SAELens."""
    store = make_store(folder, segments, segment_rows, d_model)
    paths = sorted((folder / SITE.folder).iterdir())
    warm = measure_warm(store, paths, runs)
    cold = alternate({"front to back": lambda: front_to_back(paths, d_model, fresh=True),
                      "shuffled": lambda: shuffled(open_stream(store, 1))}, max(3, runs // 2), lambda: drop(paths))
    before, most = own_memory(), 0
    found = []
    stream = open_stream(store, 1)
    for _ in range(stream.batches):
        found += contexts(iter([stream.next_batch()[SITE]]))
        most = max(most, own_memory())
    stream.close()
    round_bytes = max(stream.rounds.sizes) * 2 * d_model
    return {"store": {"segments": segments, "segment_rows": segment_rows, "d_model": d_model, "rows": store.rows,
                      "bytes": sum(path.stat().st_size for path in paths), "contexts": store.rows // CONTEXT,
                      "rounds": len(stream.rounds.sizes), "reader_threads": READERS},
            "rows_per_second": {"warm": warm, "cold": cold},
            "contexts_per_batch": {"least": min(found), "median": statistics.median(found)},
            "memory": {"over_before_bytes": most - before, "round_bytes": round_bytes,
                       "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}


def measure_saelens(folder: Path, d_model: int, rows: int, runs: int) -> dict[str, Any]:
    """SAELens on its own cache, warm, with two buffer sizes."""
    make_saelens_cache(folder, d_model, rows)
    ways: Ways = {"default buffer": lambda: saelens_store(folder, d_model, rows, None),
                  "buffer of 131072 rows": lambda: saelens_store(folder, d_model, rows, 131072)}
    for way in ways.values():
        seconds_per_row(way())
    rates = alternate(ways, runs, lambda: None)
    found = {name: contexts(way()) for name, way in ways.items()}
    return {"rows": rows, "rows_per_second": rates,
            "contexts_per_batch": {name: {"least": min(counts), "median": statistics.median(counts)}
                                   for name, counts in found.items()}}


def show(result: dict[str, Any]) -> None:
    """Print the ratios."""
    store, gigabyte = result["store"], 2 * result["store"]["d_model"] / 1e9
    print(f"{store['rows']:,} rows of width {store['d_model']}, {store['segments']} segments, {store['rounds']} rounds")
    for state, rates in result["rows_per_second"].items():
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in medians.items():
            print(f"{state:5} {name:18} {rate:12,.0f} rows/s  {rate * gigabyte:6.2f} GB/s  "
                  f"{rate / medians['front to back']:5.2f} of front to back")
    print(f"contexts in a batch of {BATCH}: {result['contexts_per_batch']} of {store['contexts']}")
    memory = result["memory"]
    print(f"memory {memory['over_before_bytes'] / 1e9:.2f} GB; two rounds: {2 * memory['round_bytes'] / 1e9:.2f} GB")
    if "saelens" in result:
        ours = statistics.median(result["rows_per_second"]["warm"]["shuffled"])
        for name, values in result["saelens"]["rows_per_second"].items():
            print(f"SAELens, {name}: {statistics.median(values):,.0f} rows/s: we read "
                  f"{ours / statistics.median(values):.1f} times as fast; contexts "
                  f"{result['saelens']['contexts_per_batch'][name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, default=Path("read_store_benchmark"))
    parser.add_argument("--segments", type=int, default=384)
    parser.add_argument("--segment-rows", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--saelens", action="store_true", help="also SAELens, which must be installed")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.folder / "store", arguments.segments, arguments.segment_rows, arguments.d_model,
                         arguments.runs)
        shutil.rmtree(arguments.folder / "store")
        if arguments.saelens:
            rows = min(result["store"]["rows"], 2**17)
            result["saelens"] = measure_saelens(arguments.folder / "saelens", arguments.d_model, rows, arguments.runs)
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
