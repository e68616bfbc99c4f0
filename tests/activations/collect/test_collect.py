"""Collection gives the rows of a plain forward pass, whatever interrupted it; bad input gets one line."""

import json
import shutil

import numpy as np
import pytest
import torch

from helpers import read_streams, recipe, save_small_model, small_model, write_documents
from olmoscope.activations.collect.run import collect
from olmoscope.activations.store.format import read_activations, read_manifest, read_rows, verify_segment
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.files import locked, sha256
from olmoscope.model.layers import find_layers
from olmoscope.model.load import load_model
from olmoscope.site import Site
from olmoscope.tokens.chunks import positions
from olmoscope.tokens.segments import read_token_segment


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_documents(folder / "corpus", count=90)
    return recipe(folder / "corpus")


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """A finished store that tests copy."""
    store = tmp_path_factory.mktemp("whole") / "train"
    collect(job, "train", store)
    return store


def files(store):
    return {str(path.relative_to(store)): sha256(path) for path in sorted(store.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


@pytest.mark.parametrize("documents", ["share", "apart"])
@pytest.mark.parametrize("architecture", ["Olmo3", "GPT2"])
def test_rows_equal_a_plain_forward(architecture, documents, tmp_path):
    write_documents(tmp_path / "corpus", count=90, words=12)
    save_small_model(architecture, tmp_path / "model")
    job = recipe(tmp_path / "corpus", model__name=str(tmp_path / "model"), model__dtype="float32",
                 activations__dtype="float32", activations__layers=[0, 3], tokens__documents=documents,
                 saes=[{"layer": 0, "d_sae": 64, "k": 4}])
    manifest = collect(job, "train", tmp_path / "store").manifest
    assert (manifest.rows, manifest.finished, manifest.model.num_layers) == (3000, True, 4)
    assert manifest.model.layers_path == {"Olmo3": "model.layers", "GPT2": "transformer.h"}[architecture]
    model = small_model(architecture)
    layers = find_layers(model, 4)[1]
    for segment in range(manifest.segments):
        tokens, rows = read_token_segment(tmp_path / "store", segment), read_rows(tmp_path / "store", segment)
        for number, start, stop in zip(tokens.sequence_numbers, tokens.sequence_starts[:-1],
                                       tokens.sequence_starts[1:], strict=True):
            ids = torch.from_numpy(tokens.token_ids[start:stop]).long()
            positions_T = torch.from_numpy(positions(tokens.document_ids[start:stop], documents))
            want = read_streams(model, layers, [0, 3], ids[None], positions_T[None])
            mine = torch.nonzero(rows["sequence"] == number)[:, 0]
            mine = mine[torch.argsort(rows["position"][mine])]
            assert torch.equal(rows["token_id"][mine].long(), ids)
            assert torch.equal(rows["position"][mine], torch.arange(len(ids), dtype=torch.int32))
            for layer in (0, 3):
                got = read_activations(tmp_path / "store", Site(layer), segment, slice(0, tokens.rows))[mine]
                torch.testing.assert_close(got, want[layer][0], rtol=1e-4, atol=1e-4)


def test_a_store_holds_each_token_once_and_is_shuffled(whole):
    manifest = read_manifest(whole)
    assert (manifest.rows, manifest.dtype, manifest.sources["web"].tokens) == (3000, "bfloat16", 3000)
    pairs = set()
    for segment in range(manifest.segments):
        verify_segment(whole, segment)
        rows = read_rows(whole, segment)
        pairs |= set(zip(rows["sequence"].tolist(), rows["position"].tolist(), strict=True))
        assert (np.diff(rows["position"].numpy()) != 1).mean() > 0.9
    assert len(pairs) == 3000


def test_again_does_nothing(job, whole, tmp_path):
    before = files(whole)
    again = collect(job, "train", whole)
    assert again.segments_made == 0
    assert files(whole) == before


def test_lost_segments_are_made_anew_and_equal(job, whole, tmp_path):
    store = tmp_path / "train"
    shutil.copytree(whole, store)
    (store / "checksums" / "segment-000001.json").unlink()
    (store / "layer_07" / "segment-000001.safetensors").write_bytes(b"half")
    (store / "layer_07" / ".segment-000001.safetensors.99.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match=r"lacks segment 1; run `olmoscope collect` again"):
        open_store(store)
    assert collect(job, "train", store).segments_made == 1
    assert files(store) == files(whole)


def test_an_unfinished_store_is_not_read(whole, tmp_path):
    store = tmp_path / "train"
    shutil.copytree(whole, store)
    manifest = json.loads((store / "manifest.json").read_text()) | {"finished": False}
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not finished"):
        open_store(store)


def test_damage_is_named(whole, tmp_path):
    store = tmp_path / "train"
    shutil.copytree(whole, store)
    path = store / "layer_01" / "segment-000000.safetensors"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"layer_01/segment-000000.safetensors is damaged"):
        read_activations(store, Site(1), 0, slice(0, 10))
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its checksum differs"):
        verify_segment(store, 0)
    path.unlink()
    with pytest.raises(UserError, match="it is missing"):
        verify_segment(store, 0)
    (store / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(store)
    manifest = json.loads((whole / "manifest.json").read_text())
    for change, message in (({"version": 3}, "has store format 3"), ({"format": "x"}, "not the manifest"),
                            ({"rows": "many"}, "is damaged: rows")):
        (store / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=message):
            read_manifest(store)


def test_another_recipe_or_model_is_refused(job, whole, tmp_path):
    other = job.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="holds the store of another recipe"):
        collect(other, "train", whole)
    store = tmp_path / "train"
    shutil.copytree(whole, store)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["finished"] = False
    manifest["model"]["revision"] = "sha256:0"
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "checksums" / "segment-000001.json").unlink()
    with pytest.raises(UserError, match="at revision sha256:0"):
        collect(job, "train", store)


def test_two_at_once_are_refused(job, whole):
    with locked(whole, "collecting", ".lock-worker-0-of-1"), \
            pytest.raises(UserError, match="another process is collecting"):
        collect(job, "train", whole)


def test_not_finite_activations_are_refused(tmp_path):
    write_documents(tmp_path / "corpus", count=90)
    save_small_model("Llama", tmp_path / "model")
    model = small_model("Llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    job = recipe(tmp_path / "corpus", model__name=str(tmp_path / "model"), activations__layers=[0, 1],
                 saes=[{"layer": 0, "d_sae": 64, "k": 4}])
    with pytest.raises(UserError, match=r"layers\.1 gave NaN or infinite activations"):
        collect(job, "train", tmp_path / "store")


def test_a_store_that_cannot_fit_is_refused_before_anything_is_written(job, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"needs 3.1 MB more, but the disk has 1.0 kB free"):
        collect(job, "train", tmp_path / "store")
    assert not (tmp_path / "store" / "layer_01").exists()


def test_what_chats_lost_is_said(tmp_path, capsys):
    from olmoscope.cli import tables

    part = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is this? " * 40}]
    line = json.dumps({"messages": [{"role": "user", "content": part}]}) + "\n"
    (tmp_path / "chats.jsonl").write_text(line * 20)
    source = {"kind": "chat", "name": "web", "paths": [str(tmp_path / "chats.jsonl")]}
    collected = collect(recipe(tmp_path, text__sources=[source], text__held_out_share=0.0, tokens__count=500), "train",
                        tmp_path / "store")
    tables.show_stores([collected])
    said = " ".join(capsys.readouterr().out.split())
    assert f"its text has no place for it: image ({collected.manifest.sources['web'].documents})" in said


def test_a_model_that_fails_on_some_batch_is_said_in_one_line(job, tmp_path):
    def load(*arguments):
        model = load_model(*arguments)
        model.layers[0].register_forward_pre_hook(fail)
        return model

    def fail(module, inputs):
        raise RuntimeError("expected m1 and m2 to have the same dtype\nand more")

    with pytest.raises(UserError, match=r"^tiny does not run in \w+: expected m1 and m2 to have the same dtype(;.*)?$"):
        collect(job, "train", tmp_path / "store", load=load)
