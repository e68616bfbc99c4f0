"""Making an index: its options, what it refuses, and that making it again does nothing."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch

from commands import run_forked
from feature_index import small_index
from olmoscope.activations.store.reader import open_store
from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex, find_indexes
from olmoscope.features.rows_of import index_sae
from olmoscope.files import sha256
from olmoscope.model.dtype import fast_dtype
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Filter, Model
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer
from olmoscope.tokens.vocabulary import token_texts
from olmoscope.train.initialize import initialize


@pytest.fixture
def path(tmp_path):
    return small_index(tmp_path)


def files(folder):
    return {name: sha256(name) for name in folder.rglob("*") if name.is_file() and not name.name.startswith(".")}


def test_doing_it_again_does_nothing(path):
    before = files(path)
    again = index_sae(str(path.parent), device="cpu")
    assert not again.fresh and again.folder == path and files(path) == before


def test_two_indexes_of_the_same_are_equal(path, tmp_path):
    second = index_sae(str(path.parent), out=tmp_path / "out" / "runs" / "second", device="cpu").folder
    ours, theirs = ({name.relative_to(folder): value for name, value in files(folder).items()
                     if name.name != "manifest.json"} for folder in (path, second))
    assert ours == theirs


def test_another_index_is_not_overwritten(path):
    before = files(path)
    with pytest.raises(UserError, match=r"holds another index .of layer_01.*--out"):
        index_sae(str(path.parent), filter_=Filter(first_positions=1), device="cpu")
    assert files(path) == before


def test_the_beginning_of_another_index_is_not_gone_on_with(path, tmp_path):
    (tmp_path / "begun" / "work").mkdir(parents=True)
    (tmp_path / "begun" / "work" / "identity.json").write_text('{"identity": "another"}')
    with pytest.raises(UserError, match="beginning of another index"):
        index_sae(str(path.parent), out=tmp_path / "begun", device="cpu")
    with pytest.raises(UserError, match="not finished: run the same"):
        FeatureIndex(tmp_path / "begun")


def test_damage_is_found_when_it_is_done_again(path):
    part = path / "features" / "part-000000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"part-000000.safetensors is damaged .its checksum differs"):
        index_sae(str(path.parent), device="cpu")


def test_rows_that_do_not_fit_are_refused(path, tmp_path):
    run, store = path.parent, tmp_path / "out" / "store" / "held_out"
    manifest = json.loads((store / "manifest.json").read_text())

    def refused(message, **changes):
        (store / "manifest.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(UserError, match=message):
            index_sae(str(run), store=store, out=tmp_path / "new", device="cpu")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)

    model = manifest["model"]
    refused("is of model tiny, .* has rows of gpt2; give another --store, or --model", model=model | {"name": "gpt2"})
    refused(r"has no rows of layers\.1, which layer_01.* reads; it has layers\.7", sites=["layers.7"])
    refused("reads rows of width 256, those of .* have 300", widths=[300, 300])
    refused("was trained on revision sha256:.* is of revision other", model=model | {"revision": "other"})
    refused("is not finished", finished=False)
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "rows" / "segment-000000.safetensors").write_bytes(b"")
    refused("segment-000000.safetensors is damaged .its checksum differs")


def test_what_is_asked_for_must_make_sense(path, tmp_path):
    run = path.parent
    with pytest.raises(UserError, match="--store and --text exclude each other"):
        index_sae(str(run), store=tmp_path, text=str(tmp_path))
    with pytest.raises(UserError, match="has an unknown format"):
        index_sae(str(tmp_path))
    with pytest.raises(UserError, match="there is no file or folder of that name, and it is not a hub dataset"):
        index_sae(str(run), text=str(tmp_path / "absent"), out=tmp_path / "new", device="cpu")
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        index_sae(str(run), store=tmp_path, out=tmp_path / "new", device="cpu")
    shutil.rmtree(tmp_path / "out" / "store")
    with pytest.raises(UserError, match=r"no finished activation store near .*--text"):
        index_sae(str(run), out=tmp_path / "new", device="cpu")


def test_the_held_out_store_serves_where_there_is_no_other(path, tmp_path):
    shutil.rmtree(tmp_path / "out" / "store" / "train")
    indexed = index_sae(str(path.parent), out=tmp_path / "new", device="cpu")
    assert indexed.info.store["split"] == "held_out" and indexed.info.rows == 500


def test_weights_that_are_not_finite_are_refused(path, tmp_path):
    from olmoscope.sae.io import saelens

    sae = initialize(256, 64, 4, "none", torch.zeros(256), seed=0)
    metadata = dict.fromkeys(("hf_hook_name", "context_size", "prepend_bos", "dataset_path", "l0", "num_dead_features"))
    sae.b_latent[0] = 3e38
    sae.W_dec[0] *= 1e38
    saelens.write(sae, tmp_path / "sae", metadata | {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"})
    with pytest.raises(UserError, match=r"activations are not finite at layers\.1 in segment 0"):
        index_sae(str(tmp_path / "sae"), store=tmp_path / "out" / "store" / "train", out=tmp_path / "new", device="cpu")
    with pytest.raises(UserError, match="has no default folder; give --out"):
        index_sae(str(tmp_path / "sae"), store=tmp_path / "out" / "store" / "train", device="cpu")


def test_a_text_is_read_by_the_model(path, tmp_path):
    """A text in several kinds of files: the tokens are those of the texts, the activations those of the model."""
    text = tmp_path / "text"
    text.mkdir()
    documents = ["A plain text, with <b>markup</b>.\n\nAnd a second line.", "First of a shard.", "Second of a shard."]
    (text / "plain.md").write_text(documents[0])
    with gzip.open(text / "shard.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": one}) + "\n" for one in documents[1:])
    indexed = index_sae(str(path.parent), text=str(text), out=tmp_path / "new", device="cpu")
    assert indexed.fresh and not (tmp_path / "new" / "work").exists()
    index = FeatureIndex(tmp_path / "new")
    assert index.info.documents == 3 and index.info.sources.keys() == {"dolma", "files"}
    assert index.info.model_dtype == fast_dtype(torch.device("cpu"))
    shown = "".join(index.tokens.texts(index.corpus.tokens_T.tolist())).split("<|endoftext|>")
    assert sorted(shown) == sorted(["", *documents])
    model = load_model(Model(name="tiny"), [Site(1)], torch.device("cpu"))
    outputs = []
    model.layers[1].register_forward_hook(lambda _, __, output: outputs.append(output))
    model.module(torch.from_numpy(np.array(index.corpus.tokens_T)).long()[None], use_cache=False)
    from olmoscope.sae.io.open import open_sae

    x_TD = (outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0])[0]
    dense_TF = open_sae(path.parent).sae.encode(x_TD).to_dense().numpy()
    for feature in range(512):
        places, values = index.firing_values(feature)
        assert np.flatnonzero(dense_TF[:, feature]).tolist() == places.tolist()
        np.testing.assert_allclose(values, dense_TF[places, feature], rtol=1e-4)
    assert not index_sae(str(path.parent), text=str(text), out=tmp_path / "new", device="cpu").fresh
    (text / "plain.md").write_text("Another text.")
    with pytest.raises(UserError, match="holds another index"):
        index_sae(str(path.parent), text=str(text), out=tmp_path / "new", device="cpu")


def test_a_text_of_the_hub(path, hub_endpoint, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": f"A text of the hub, {number}."}) + "\n" for number in range(5)]
    (folder / "train.jsonl").write_text("".join(lines))
    hub_endpoint.add("dataset", "someone/texts", folder)
    done = run_forked("index", path.parent, "--text", "someone/texts", "--out", tmp_path / "new",
                      environment=hub_endpoint.environment(tmp_path / "hf"), hub=True)
    assert done.returncode == 0, done.stderr
    assert FeatureIndex(tmp_path / "new").info.documents == 5



def test_all_saes_of_an_output_folder(path, tmp_path):
    from typer.testing import CliRunner

    from olmoscope.cli.app import app

    done = CliRunner().invoke(app, ["index", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    output = done.output.replace("\n", "")
    assert "unchanged" in output and "features (" in output and f"olmoscope browse {tmp_path / 'out'}" in output
    assert len(find_indexes(tmp_path / "out")) == 2


def test_texts_of_tokens():
    """Byte-level: the joined tokens of any text give the text; bytes that are not valid UTF-8 alone show as bytes."""
    backend = load_tokenizer(Model(name="tiny")).backend
    texts = token_texts(backend)
    text = "def f(x):\n\treturn \"<script>\" + x  # naïve 🙂 \0 \u202e"
    shown = "".join(texts[token] for token in backend.encode(text, add_special_tokens=False).ids)
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), shown.encode())
    assert raw.decode() == text and shown.startswith('def f(x):\n\treturn "<script>"')
    assert len(texts) == 4096 and texts[0] == "<|endoftext|>"


def test_texts_of_a_byte_fallback_tokenizer():
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE({"<unk>": 0, "▁the": 1, "<0xE2>": 2, "<0x41>": 3, "cat": 5}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert token_texts(backend) == ["<unk>", " the", "\\xe2", "A", "", "cat"]


def test_the_default_is_every_row_of_the_training_store(path, tmp_path):
    info = FeatureIndex(path).info
    assert info.rows == open_store(tmp_path / "out" / "store" / "train").rows and info.store["split"] == "train"
    assert info.evaluation["sae"] == info.sae.name and info.provenance["olmoscope"]
