"""Sparse probing finds a planted latent, gives 0.5 for random labels, and reports mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
import zstandard

from olmoscope.errors import UserError
from olmoscope.evaluate import behaviour, labelled
from olmoscope.evaluate.anywhere import Options, evaluate_anywhere
from olmoscope.evaluate.behaviour import Behaviour
from olmoscope.evaluate.labelled import read_tables
from olmoscope.evaluate.last_rows import last_rows
from olmoscope.evaluate.probing import PROBING, by_difference, values_of
from olmoscope.evaluate.results import EVALUATION, read_evaluation
from olmoscope.model.capture import read_sites
from olmoscope.model.load import load_model
from olmoscope.recipe.schema import Model
from olmoscope.sae.codes import SparseCodes
from olmoscope.sae.io import saelens
from olmoscope.sae.topk import TopK
from olmoscope.site import Site
from olmoscope.tokens.tokenizer import load_tokenizer

SITE = Site(1)
MODEL = Model(name="tiny", dtype="float32")


def texts(count=200):
    """Half of them end in `class`, half in `list`."""
    return [(f"value {number} of row {number * 7 % 31} is a {ending}", ending)
            for number in range(count // 2) for ending in ("class", "list")]


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "target"), *rows])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder / "ending.csv", texts())
    random = np.random.default_rng(0)
    write_table(folder / "nothing.csv", [(text, label) for (text, _), label in zip(
        texts(), random.permutation([0, 1] * 100), strict=True)])
    write_table(folder / "three.csv", [(text, number % 3) for number, (text, _) in enumerate(texts())])
    (folder / "notes.txt").write_text("no table")
    return folder


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, [SITE], torch.device("cpu"))


def rows_of(model, written):
    tokenizer = load_tokenizer(MODEL)
    ids = [encoded[:-1] for encoded in tokenizer.encode(list(written))]
    return last_rows(model, ids, 512, lambda tokens: None)[SITE]


@pytest.fixture(scope="module")
def planted(model, tmp_path_factory):
    """An SAE whose latent 5 fires on texts that end in `class` and on no others; the rest are random."""
    x_ND = rows_of(model, [text for text, _ in texts()])
    of_class, of_list = x_ND[0::2].mean(0), x_ND[1::2].mean(0)
    way_D = torch.nn.functional.normalize(of_class - of_list, dim=0)
    W_FD = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    W_FD = torch.nn.functional.normalize(W_FD - (W_FD @ way_D)[:, None] * way_D, dim=1)
    W_FD[5] = way_D
    encoder_FD = W_FD.clone()
    encoder_FD[5] *= 10  # among the k of every row that it is to fire on
    sae = TopK(encoder_FD, W_FD, (of_class + of_list) / 2, "none", b_latent=torch.zeros(64), k=8).at([SITE])
    folder = tmp_path_factory.mktemp("planted") / "planted"
    saelens.write(sae, folder, {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post", "context_size": 64,
                                "prepend_bos": False, "hf_hook_name": "model.layers.1", "dataset_path": "made",
                                "model_revision": None, "training_tokens": 0})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(text for text, _ in texts(40)))
    return path


def options(out, text, behaviour):
    return Options(out, str(text), 200, dtype="float32", behaviour=behaviour)


def test_a_planted_latent_is_found_and_labels_of_nothing_tell_nothing(planted, text, tables, tmp_path, monkeypatch):
    [one] = evaluate_anywhere([str(planted)], options(tmp_path, text, Behaviour(True, "ending", tables)))
    found = read_evaluation(one.folder / EVALUATION).probing
    assert (found.source, found.tables) == (tables.name, ["ending"])
    assert {k: (figures.auc, figures.accuracy) for k, figures in found.latents.items()} == dict.fromkeys(
        (1, 5, 16), (1.0, 1.0))
    assert found.activations.auc == 1 and found.latents[1].intervals == {}  # one table has none
    kept = json.loads((one.folder / PROBING).read_text())["tables"]["ending"]
    assert (kept["train"], kept["test"], kept["k"]["1"]["latents"]) == (100, 100, [5])
    # Another table is added to it; the first is not measured again.
    evaluate_anywhere([str(planted)], options(tmp_path, text, Behaviour(True, "all", tables)))
    found = read_evaluation(one.folder / EVALUATION).probing
    tables_now = json.loads((one.folder / PROBING).read_text())["tables"]
    assert tables_now["ending"] == kept and set(found.tables) == {"ending", "nothing"}
    nothing = tables_now["nothing"]
    for probe in (*nothing["k"].values(), nothing["activations"]):
        assert abs(probe["auc"] - 0.5) < 4 / 100**0.5 * (1 / 3) ** 0.5  # 4 standard deviations of a ranking by chance
    low, high = found.latents[1].intervals["auc"]
    assert low < found.latents[1].auc < high == 1
    before = (one.folder / PROBING).read_bytes(), (one.folder / EVALUATION).read_bytes()
    with monkeypatch.context() as without:
        without.setattr(behaviour, "load_model", None)  # it is not needed again
        evaluate_anywhere([str(planted)], options(tmp_path, text, Behaviour(True, "all", tables)))
    assert ((one.folder / PROBING).read_bytes(), (one.folder / EVALUATION).read_bytes()) == before
    write_table(tmp_path / "odd" / "odd.csv", [("", number % 2) for number in range(300)])
    with pytest.raises(UserError, match="table odd has a text without tokens"):
        evaluate_anywhere([str(planted)], options(tmp_path, text, Behaviour(True, None, tmp_path / "odd")))
    evaluate_anywhere([str(planted)], options(tmp_path, text, Behaviour()))
    assert read_evaluation(one.folder / EVALUATION).probing == found  # evaluated before: it stays


def test_rows_are_those_of_the_last_token(model):
    written = ["a", "one two three four", "of it", "x = [1, 2, 3]\n"]
    x_ND = rows_of(model, written)
    for text, x_D in zip(written, x_ND, strict=True):
        [encoded] = load_tokenizer(MODEL).encode([text])
        alone = read_sites(model.module, list(model.sites.places.values()), torch.from_numpy(encoded[None, :-1]).long())
        torch.testing.assert_close(x_D, alone[SITE][0, -1], rtol=1e-4, atol=1e-4)


def test_latents_by_difference_of_means():
    """The formula on dense codes."""
    generator = torch.Generator().manual_seed(0)
    z_NF = torch.relu(torch.randn(40, 12, generator=generator))
    z_NF[:, 3] = 0
    y_N = torch.rand(40, generator=generator) < 0.5
    z_NF[y_N, 7] += 2
    values_NK, indices_NK = z_NF.topk(12)
    codes = SparseCodes(values_NK, indices_NK, 12)
    z_MF, y_M = z_NF[:30].double(), y_N[:30]
    typical_F = z_MF.sum(0) / (z_MF != 0).sum(0).clamp_min(1)
    difference_F = (z_MF[y_M].mean(0) - z_MF[~y_M].mean(0)).abs() / typical_F.clamp_min(1e-9)
    order_F = by_difference(codes, y_N, 30)
    assert order_F.tolist() == difference_F.argsort(descending=True).tolist()
    assert torch.equal(values_of(codes, order_F[:4]), z_NF[:, order_F[:4]])


def test_a_split_is_balanced_and_keeps_texts_apart():
    table = labelled.Table("t", tuple(map(str, range(5000))), tuple(number < 1000 for number in range(5000)))
    for count, train, test in ((5000, 1024, 512), (1400, 1024, 376)):
        labels = tuple(number < count / 2 for number in range(count))
        table = labelled.Table("t", tuple(map(str, range(count))), labels)
        rows = table.split()
        assert [len(part) for part in rows] == [train, test]
        assert len({*rows[0], *rows[1]}) == train + test
        assert [int(np.array(labels)[part].sum()) for part in rows] == [train // 2, test // 2]
        assert 0 < np.array(labels)[rows[0]][: train // 2].sum() < train // 2  # in random order
    few = labelled.Table("t", tuple(map(str, range(300))), tuple(number < 90 for number in range(300)))
    with pytest.raises(UserError, match="table t: only 90 texts have its rarer label"):
        few.split()


def test_some_tables_are_the_first_of_more(tmp_path):
    for number in range(6):
        write_table(tmp_path / f"{number}.csv", [("short", 0), ("text", 1)])
    write_table(tmp_path / "long.csv", [("x" * 1000, 0), ("text", 1)])
    compressed = tmp_path / "0.csv"
    (tmp_path / "0.csv.zst").write_bytes(zstandard.compress(compressed.read_bytes()))
    compressed.unlink()
    names = [[table.name for table in read_tables(tmp_path, wanted).tables] for wanted in ("3", "6", None, "all")]
    assert names[1][:3] == names[0] and names[1] == names[2]
    assert "long" not in names[2] and set(names[3]) == {*names[2], "long"}


def test_what_is_wrong_is_said(tables, tmp_path, monkeypatch):
    def refused(message, wanted, folder=tables):
        with pytest.raises(UserError, match=message):
            read_tables(folder, wanted)

    refused("holds no table 'ends'", "ending,ends")
    refused("three does not have exactly two labels", "three")
    refused("holds no table of short texts with two labels", "0")
    refused("holds no labelled tables", None, tmp_path)
    (tmp_path / "odd.csv").write_text("text,label\na,b\n")
    refused("needs rows, and the columns prompt and target", None, tmp_path)
    (tmp_path / "odd.csv").write_bytes(b"\xff\xfe\xff")
    refused("is not a labelled table", None, tmp_path)
    monkeypatch.setattr(labelled, "PACKAGE", "no-such-package")
    refused("pip install --no-deps sae-probes", None, None)
    with pytest.raises(UserError, match="--probing-sets does nothing without --probing"):
        Behaviour(tables="3")
    with pytest.raises(UserError, match="--probing-data does nothing without --probing"):
        Behaviour(folder=tables)
