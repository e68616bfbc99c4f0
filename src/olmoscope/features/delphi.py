"""An index as Delphi's cache of latents, so that its explainers and scorers run on every firing without the model.

    ROOT/latents/MODULE/START_END.safetensors    locations [N, 3]: window, position, latent - START; activations [N];
                                                 tokens [windows, length]
    ROOT/latents/MODULE/config.json              the fields of Delphi's `CacheConfig`, and the model
    ROOT/explanations/MODULE_latentN.txt         the label of latent N as a JSON string, if it has one
    ROOT/labels/MODULE.jsonl                     who made these labels, and their scores: our own file, which Delphi
                                                 does not read (its explanations are texts and nothing else)

Delphi needs windows of one length. Sequences are cut into windows from their start, and a remainder shorter than a
window is left out, so short windows lose the least. Delphi shows no more of a text than a window. Its activations are
float16. Source: eai-delphi 0.1.3, `latents/cache.py`, `latents/loader.py` and `__main__.py`.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from olmoscope.errors import UserError
from olmoscope.features.outgoing import Counting
from olmoscope.features.read import FeatureIndex
from olmoscope.files import atomic_path, make_folder, write_json, write_text

EXAMPLE = 32
"""Tokens of the examples that Delphi cuts windows into by default; a window has a multiple of that."""
SPLIT_FIRINGS = 2**24
"""About this many firings go into a file."""
LEAST = 1e-5
"""Delphi ignores smaller activations."""
LARGEST = float(np.finfo(np.float16).max)
"""Larger activations, such as those of latents for attention sinks, become this."""


@dataclass(frozen=True)
class Cache:
    """What was written.

    Attributes:
        folder: the folder of the module, `ROOT/latents/MODULE`.
        windows, length: the number of windows of the text, and their length.
        firings: the number written; `left_out`: the number in the ends of sequences.
    """

    folder: Path
    windows: int
    length: int
    firings: int
    left_out: int


def write_delphi(index: FeatureIndex, root: Path, length: int = EXAMPLE) -> Cache:
    """Write an index as a cache for Delphi. One part of the features is in memory at a time.

    Args:
        root: Delphi's folder for a run; the cache goes into `latents/` in it.
        length: tokens of a window, a multiple of Delphi's `example_ctx_len`.

    Raises:
        UserError: all sequences are shorter than a window, or the length is not that of whole examples.
    """
    if length < 1 or length % EXAMPLE:
        raise UserError(f"--window {length}: Delphi's examples have {EXAMPLE} tokens, so a window has a multiple of "
                        "that")
    longest = int(np.diff(index.corpus.sequences_S1).max())
    if longest < length:
        raise UserError(f"the longest sequence of {index.path} has {longest} tokens, and a window {length}: index a "
                        "longer text" + (f", or give a shorter --window (from {EXAMPLE})" if length > EXAMPLE else ""))
    tokens_WL, where_T = _windows(index, length)
    folder = root / "latents" / str(index.info.sae.site)
    make_folder(folder)
    (folder / "config.json").unlink(missing_ok=True)  # written last: it says that all files are there
    for earlier in folder.glob("*_*.safetensors"):  # Delphi reads all that are there
        earlier.unlink()
    features, splits = index.info.sae.d_sae, max(1, -(-index.info.firings // SPLIT_FIRINGS))
    borders = np.linspace(0, features, splits + 1).astype(np.int64)
    written = 0
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        locations_N3, activations_N = _firings(index, range(start, end), where_T, length)
        written += len(activations_N)
        with atomic_path(folder / f"{start}_{end - 1}.safetensors") as temporary:
            save_file({"locations": locations_N3, "activations": activations_N, "tokens": tokens_WL}, temporary)
    write_json(folder / "config.json", {
        "dataset_repo": "", "dataset_split": str(index.info.store.get("split", "train")), "dataset_name": "",
        "dataset_column": "text", "batch_size": 32, "cache_ctx_len": length, "ctx_len": length,
        "n_tokens": int(tokens_WL.size), "n_splits": splits, "model_name": index.info.model.name})
    return Cache(folder, len(tokens_WL), length, written, index.info.firings - written)


def write_explanations(index: FeatureIndex, root: Path, labels: Mapping[int, Counting]) -> tuple[int, int]:
    """Write labels, by feature, where Delphi looks for explanations (`--explainer none` scores what is there), and a
    file that says who made them, with their scores.

    An explanation with another text stays unchanged, since Delphi itself may have made it; it is not in that file.

    Returns:
        How many labels there are, and how many explanations were left alone.
    """
    folder, kept, about = root / "explanations", 0, []
    for feature, label in sorted(labels.items()):
        path = folder / f"{index.info.sae.site}_latent{feature}.txt"
        text = json.dumps(label.label)
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            kept += 1
            continue
        make_folder(folder)
        write_text(path, text)
        about.append(json.dumps(label.as_json(), ensure_ascii=False) + "\n")
    beside = root / "labels" / f"{index.info.sae.site}.jsonl"
    if about:
        make_folder(beside.parent)
        write_text(beside, "".join(about))
    else:
        beside.unlink(missing_ok=True)
    return len(about), kept


def _windows(index: FeatureIndex, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows' tokens `[W, L]`, int64, and the index of each place among them: window · L + position, or -1 if it
    is in an end that is left out."""
    corpus = index.corpus
    starts_W = np.concatenate([np.arange(first, last - length + 1, length)
                               for first, last in itertools.pairwise(corpus.sequences_S1.tolist())])
    places_WL = starts_W[:, None] + np.arange(length)
    where_T = np.full(index.info.tokens, -1, np.int64)
    where_T[places_WL] = np.arange(places_WL.size).reshape(places_WL.shape)
    return np.asarray(corpus.tokens_T)[places_WL].astype(np.int64), where_T


def _firings(index: FeatureIndex, features: range, where_T: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Locations `[N, 3]` and activations `[N]`, float16, of some features: latents ascending, then places."""
    locations, activations = [np.empty((0, 3), np.int64)], [np.empty(0, np.float16)]
    for feature in features:
        places, values = index.firing_values(feature)
        where = where_T[places]
        taken = (where >= 0) & (values > LEAST)
        where = where[taken]
        locations.append(np.stack([where // length, where % length, np.full(len(where), feature - features.start)], 1))
        activations.append(values[taken].clip(max=LARGEST).astype(np.float16))
    locations_N3 = np.concatenate(locations)
    small = not len(locations_N3) or int(locations_N3.max()) < 2**16
    return locations_N3.astype(np.uint16 if small else np.uint32), np.concatenate(activations)
