"""docs/formats.md and docs/metrics.md are correct: a reader written from them reads the store; no key is missing."""

import ast
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import store_reader
from helpers import recipe, write_documents
from olmoscope.activations.store.format import read_activations, read_rows
from olmoscope.pipeline import collect_stores, evaluate_saes, store_folder, train_saes
from olmoscope.release.build import build_release
from olmoscope.site import Site

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    write_documents(folder / "corpus", count=90)
    return recipe(folder / "corpus", tokens__count=2000, seed=7)


@pytest.fixture(scope="module")
def out(job, tmp_path_factory):
    """The whole output folder of a small job."""
    out = tmp_path_factory.mktemp("formats out") / "out"
    collect_stores(job, out)
    list(train_saes(job, out, []))
    list(evaluate_saes(job, out, []))
    build_release(out)
    return out


def documented(page):
    """What a page names in code marks; `layer_LL` stands for any layer, NNNNNN for any segment."""
    text = (DOCS / page).read_text()
    return {part for span in re.findall(r"`([^`\n]+)`", text) for part in (span, *re.split(r"[, ]+", span))}


def keys(value):
    """All keys of a JSON value, except names (of sources, layers, files, libraries) and a recipe's settings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key in ("sources", "sites", "files", "libraries", "sha256", "blocks") and isinstance(inner, dict):
                inner = list(inner.values())
            if key != "recipe":
                yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def test_the_reader_is_independent():
    tree = ast.parse(Path(store_reader.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"hashlib", "json", "pathlib", "numpy"}


def test_a_reader_written_from_the_page_gets_the_same_rows(job, out):
    for split in ("train", "held_out"):
        folder = store_folder(out, split)
        reader = store_reader.StoreReader(folder)
        assert reader.sources == ["web"]
        assert reader.manifest["rows"] == {"train": 2000, "held_out": 500}[split]
        for segment in range(reader.manifest["segments"]):
            assert reader.sound(segment)
            theirs = read_rows(folder, segment)
            count = len(theirs["token_id"])
            for site in map(Site.parse, reader.manifest["sites"]):
                activations, rows = reader.read(site.folder, segment)
                assert reader.blocks_are_sound(site.folder, segment)
                ours = read_activations(folder, site, segment, slice(0, count))
                assert torch.equal(torch.from_numpy(activations), ours.float())
                assert all(np.array_equal(rows[name], tensor.numpy()) for name, tensor in theirs.items())
                assert set(rows) == set(theirs)
            sequences = reader.tokens(segment)
            tokens = [sequences[int(number)][place]
                      for number, place in zip(rows["sequence"], rows["position"], strict=True)]
            assert np.array_equal(tokens, rows["token_id"])
            stream = np.concatenate(list(sequences.values()))
            order = np.random.default_rng([job.seed, zlib.crc32(b"rows of a segment"), segment]).permutation(count)
            assert np.array_equal(rows["token_id"], stream[order])


def test_eight_bits_are_read_as_torch_reads_them():
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])  # those two are NaN
    assert np.array_equal(store_reader._e4m3(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())


def test_every_key_and_tensor_is_documented(out):
    """A new field or tensor must be described."""
    known = documented("formats.md") | documented("metrics.md")
    missing = []
    for path in sorted(out.rglob("*.json")):
        value = json.loads(path.read_text())
        value.pop("metadata", None)  # SAELens' own
        missing += [f"{path.relative_to(out)}: {key}" for key in keys(value) if key not in known]
    for path in out.rglob("*.jsonl"):
        missing += [f"{path.name}: {key}" for key in json.loads(path.read_text().splitlines()[0]) if key not in known]
    for path in sorted(out.rglob("*.safetensors")):
        if "statistics" not in path.relative_to(out).as_posix():
            with safe_open(path, "np") as file:
                names = [re.sub(r"_\d\d\b", "_LL", re.sub(r"\.(W|b_latent|b_pre)\.", ".NAME.", name))
                         for name in file.keys()]  # noqa: SIM118
            missing += [f"{path.relative_to(out)}: {name}" for name in names
                        if name not in known and path.name != "sae_weights.safetensors"]
    assert not missing, "\n".join(dict.fromkeys(missing))


def test_every_file_is_documented(out):
    text = (DOCS / "formats.md").read_text()
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out).as_posix()
        if path.is_file() and not path.name.startswith("."):
            name = re.sub(r"(segment|tokens)-\d+", r"\1-000042", re.sub(r"step-\d+", "step-00004883", path.name))
            assert name in text, f"{relative} is not in docs/formats.md"
