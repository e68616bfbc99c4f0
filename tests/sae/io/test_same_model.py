"""`--model` may name a copy of the SAE's model, and no other model; options never overrule what an SAE says."""

import json
import shutil
from importlib import resources

import pytest
import torch

from feature_index import small_index
from helpers import save_small_model
from olmoscope.browse.collection import open_collection
from olmoscope.errors import UserError
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.features.rows_of import index_sae
from olmoscope.sae.io import saelens
from olmoscope.sae.io.same_model import GivenModel, SaidModel, take_for_same
from olmoscope.site import Site
from olmoscope.train.initialize import initialize

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, a copy of it, the same with other weights, a deeper one, a wider one, and another architecture."""
    folder = tmp_path_factory.mktemp("models")
    save_small_model("Llama", folder / "model")
    for copy in ("copy", "weights", "depth", "width"):
        shutil.copytree(folder / "model", folder / copy)
    (folder / "weights" / "model.safetensors").write_bytes(
        (folder / "model" / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    for name, changes in (("depth", {"num_hidden_layers": 5}), ("width", {"hidden_size": 64})):
        config = json.loads((folder / name / "config.json").read_text()) | changes
        (folder / name / "config.json").write_text(json.dumps(config))
    save_small_model("GPT2", folder / "GPT2")
    return folder


def sae_of(folder, **metadata):
    said = {"model_name": None, "hook_name": "blocks.1.hook_resid_post", "hf_hook_name": None, "prepend_bos": False,
            "context_size": 40}
    saelens.write(initialize(32, 24, 4, "none", torch.zeros(32), seed=0), folder, said | metadata)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text of some words, and some more of them. " * 20)
    return str(path)


def said(models, **changes):
    revision = GivenModel(str(models / "model")).revision
    return SaidModel(**({"name": str(models / "model"), "revision": revision, "architecture": "LlamaModel",
                         "d_model": 32, "num_layers": 4} | changes))


def test_a_copy_is_the_same_model(models):
    assert take_for_same("an SAE", said(models), GivenModel(str(models / "model"))) is None
    note = take_for_same("an SAE", said(models), GivenModel(str(models / "copy")))
    assert note.startswith("note: an SAE says that its model is ") and note.endswith("(its weights are the same)")
    for unknown in ({"revision": None}, {"revision": COMMIT}):
        note = take_for_same("an SAE", said(models, name="owner/name", **unknown), GivenModel(str(models / "copy")))
        assert "owner/name" in note and note.endswith("(its weights cannot be compared)")
    only_width = said(models, name="gpt2-small", revision=None, architecture=None, num_layers=None)
    assert take_for_same("an SAE", only_width, GivenModel(str(models / "GPT2")))


@pytest.mark.parametrize(("other", "message"), [
    ("weights", r"at revision sha256:\w+, and the weights here are of revision sha256:\w+: it is another model"),
    ("depth", "of 4 layers, but this model is of 5 layers"), ("width", "of width 32, but this model is of width 64"),
    ("GPT2", "of architecture Llama, but this model is of architecture GPT2")])
def test_another_model_is_refused(models, other, message):
    with pytest.raises(UserError, match=message):
        take_for_same("an SAE", said(models), GivenModel(str(models / other)))


def test_the_hub_s_cache_knows_its_commits(models, tmp_path):
    given = shutil.copytree(models / "model", tmp_path / COMMIT)
    assert take_for_same("an SAE", said(models, name="o/n", revision=COMMIT), GivenModel(str(given))).endswith("same)")
    with pytest.raises(UserError, match="it is another model"):
        take_for_same("an SAE", said(models, name="o/n", revision="f" * 40), GivenModel(str(given)))


def test_evaluate_and_index_ask_the_same(models, text, tmp_path, capsys):
    where = sae_of(tmp_path / "sae", model_name=str(models / "model"),
                   model_revision=GivenModel(str(models / "model")).revision)

    def evaluated(model):
        return evaluate_anywhere([where], Options(tmp_path / "out", text, 100, str(models / model), "float32"))

    def indexed(model):
        return index_sae(where, text=text, out=tmp_path / f"index {model}", model_name=str(models / model),
                         device="cpu", tokens=100)

    for do in (evaluated, indexed):
        for other in ("weights", "depth", "GPT2"):
            with pytest.raises(UserError, match="it is another model"):
                do(other)
        capsys.readouterr()
        assert do("copy")
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1 and str(models / "copy") in notes[0]


def test_a_run_and_the_page_ask_the_same(models, tmp_path, capsys):
    index = small_index(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(str(resources.files("olmoscope") / "model" / "tiny"), copy)
    open_collection(index, str(copy))
    assert "its weights are the same" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"layer_01.* was trained on tiny, of width 256, but this model is of width 32"):
        open_collection(index, str(models / "model"))
    with pytest.raises(UserError, match="it is another model"):
        index_sae(str(index.parent), text=str(tmp_path), out=tmp_path / "new", model_name=str(models / "model"))
    with pytest.raises(UserError, match=r"--site layers\.5: .* says that this SAE reads layers\.1"):
        index_sae(str(index.parent), site=Site(5))


def test_bos_stands_in_and_never_overrules(models, text, tmp_path):
    model = str(models / "model")
    for says, bos in ((True, False), (False, True)):
        where = sae_of(tmp_path / f"sae {says}", model_name=model, prepend_bos=says)
        option = "--bos" if bos else "--no-bos"
        with pytest.raises(UserError, match=f"{option}: sae {says} says that it was trained on sequences that begin"):
            evaluate_anywhere([where], Options(tmp_path / "out", text, 100, dtype="float32", bos=bos))
        with pytest.raises(UserError, match=f"{option}: sae {says} says that it was trained on sequences that begin"):
            index_sae(where, text=text, out=tmp_path / "index", bos=bos, device="cpu")
    silent = sae_of(tmp_path / "silent", model_name=model, prepend_bos=None)
    assert evaluate_anywhere([silent], Options(tmp_path / "out", text, 100, dtype="float32", bos=False))


def test_centred_rows_of_a_model_with_rms_norms(models, text, tmp_path):
    """TransformerLens does not change such a model's stream; with layer norms it centres the stream, and so do we."""
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    where = sae_of(tmp_path / "sae", model_name=str(models / "model"), **centred)
    for do in (lambda: evaluate_anywhere([where], Options(tmp_path / "out", text, 100, dtype="float32")),
               lambda: index_sae(where, text=text, out=tmp_path / "index", device="cpu")):
        with pytest.raises(UserError, match=r"center_writing_weights.* RMS norms"):
            do()
    where = sae_of(tmp_path / "gpt2", model_name=str(models / "GPT2"), **centred)
    (one,) = evaluate_anywhere([where], Options(tmp_path / "out", text, 100, dtype="float32"))
    assert read_evaluation(one.folder / EVALUATION).normalize == "centred"
    assert index_sae(where, text=text, out=tmp_path / "index", device="cpu").info.rows
