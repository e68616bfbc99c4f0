"""The server's answers equal a dense computation in float64; labels survive many readers."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page, expect

from browse_server import ask, browse_server
from olmoscope.activations.store.reader import open_store
from olmoscope.browse.serve import require_extra, serve
from olmoscope.errors import UserError
from olmoscope.features.read import FeatureIndex
from olmoscope.sae.io.open import open_sae
from olmoscope.site import Site

SAE = "layer_01-width_512-topk_8_raw"


@pytest.fixture(scope="module")
def dense_NF(index_folder: Path) -> torch.Tensor:
    """All activations of the indexed rows, `[places, F]` float64, in the order of the text."""
    store = open_store(index_folder.parents[4] / "store" / "train")
    sae = open_sae(index_folder.parent).sae
    rows, keys = [], []
    for segment in range(store.manifest.segments):
        table = store.read_rows(segment)
        rows.append(store.read(site=Site(1), segment=segment, part=slice(0, len(table["sequence"]))).double())
        keys.append(torch.stack([table["sequence"].long(), table["position"].long()], dim=1))
    x_ND, keys_N2 = torch.cat(rows), torch.cat(keys)
    order_N = torch.argsort(keys_N2[:, 0] * 10**6 + keys_N2[:, 1])
    x_ND = x_ND[order_N]
    pre_NF = (x_ND - sae.b_in.double()) @ sae.W_enc.double().T + sae.b_latent.double()
    values_NK, indices_NK = pre_NF.topk(8, dim=1)
    return torch.zeros_like(pre_NF).scatter_(1, indices_NK, values_NK.clamp_min(0))


def test_figures_and_examples(port: int, index_folder: Path, dense_NF: torch.Tensor) -> None:
    texts = FeatureIndex(index_folder).tokens
    tokens = FeatureIndex(index_folder).corpus.tokens_T
    for number in (0, 7, 100, 511, int(dense_NF.count_nonzero(dim=0).argmax())):
        _, feature, _ = ask(port, "GET", f"/api/{SAE}/feature/{number}")
        column_N = dense_NF[:, number]
        fired_N = column_N[column_N > 0]
        assert feature["rows"] == len(fired_N)
        assert feature["density"] == pytest.approx(len(fired_N) / len(column_N), rel=1e-12)
        if not len(fired_N):
            continue
        assert feature["max"] == pytest.approx(float(fired_N.max()), rel=1e-4)
        assert feature["mean"] == pytest.approx(float(fired_N.mean()), rel=1e-4)
        assert sum(feature["histogram"]["counts"]) == len(fired_N)
        assert feature["groups"][0]["examples"][0]["value"] == feature["max"]
        for window in [one for group in feature["groups"] for one in group["examples"]]:
            start = window["place"] - window["at"]
            part_W = column_N[start : start + len(window["ids"])]
            shown_W = torch.tensor(window["values"], dtype=torch.float64)
            torch.testing.assert_close(shown_W, part_W, rtol=1e-4, atol=1e-4)
            assert window["ids"] == tokens[start : start + len(window["ids"])].tolist()
            assert all(feature["texts"][str(token)] == texts.text(token) for token in window["ids"])


def test_wider_windows_agree_with_narrow_ones(port: int) -> None:
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?limit=1")
    number = page["lines"][0]["feature"]
    _, feature, _ = ask(port, "GET", f"/api/{SAE}/feature/{number}")
    window = feature["groups"][0]["examples"][0]
    _, answer, _ = ask(port, "GET", f"/api/{SAE}/window/{number}/{window['place']}/400/400")
    wide = answer["window"]
    shift = wide["at"] - window["at"]
    assert wide["ids"][shift : shift + len(window["ids"])] == window["ids"]
    assert wide["values"][shift : shift + len(window["ids"])] == window["values"]
    assert not wide["more_before"] and not wide["more_after"], "sequences of this store are shorter than 400 tokens"


def test_the_list(port: int, dense_NF: torch.Tensor) -> None:
    counts_F = dense_NF.count_nonzero(dim=0)
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?sort=density&limit=500")
    assert page["total"] == 512
    assert [line["rows"] for line in page["lines"]] == sorted(counts_F.tolist(), reverse=True)[:500]
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?dead=true")
    assert page["total"] == int((counts_F == 0).sum())
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?min_density=0.01&sort=feature&descending=false&limit=500")
    assert [line["feature"] for line in page["lines"]] == torch.nonzero(counts_F >= 0.01 * len(dense_NF))[:, 0].tolist()
    third = page["lines"][2]["feature"]
    _, around, _ = ask(port, "GET", f"/api/{SAE}/around/{third}?min_density=0.01&sort=feature&descending=false")
    assert around == {"place": 2, "total": page["total"], "previous": page["lines"][1]["feature"],
                      "next": page["lines"][3]["feature"]}
    _, chosen, _ = ask(port, "GET", f"/api/{SAE}/random/5?min_density=0.01")
    assert chosen["feature"] in [line["feature"] for line in page["lines"]]


def test_labels_in_lists_and_searches(port: int) -> None:
    ask(port, "PUT", f"/api/{SAE}/label/11", {"label": "zebra stripes", "note": "seen once"})
    for query in ("search=zeb", "search=seen%20onc", "labelled=true"):
        _, page, _ = ask(port, "GET", f"/api/{SAE}/features?{query}")
        assert [line["feature"] for line in page["lines"]] == [11], query
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?labelled=false&sort=feature&descending=false")
    assert page["total"] == 511
    _, after, _ = ask(port, "GET", f"/api/{SAE}/unlabelled/10?sort=feature&descending=false")
    assert after == {"feature": 12}
    _, feature, _ = ask(port, "GET", f"/api/{SAE}/feature/11")
    assert feature["entry"]["label"] == "zebra stripes"
    lines = ask(port, "GET", f"/api/{SAE}/labels.jsonl")[1]
    assert json.loads(lines.splitlines()[0])["label"] == "zebra stripes"
    assert ask(port, "POST", f"/api/{SAE}/labels.jsonl", {"lines": lines})[1] == {"new": 0}
    assert ask(port, "PUT", f"/api/{SAE}/label/11", {"label": ""})[0] == 200


def test_fifty_readers_while_labels_are_written(port: int) -> None:
    done, problems, read = threading.Event(), [], []

    def reader(number: int) -> None:
        while not done.is_set():
            for path in (f"feature/{number}", f"features?search=writing&offset={number % 3}", f"label/{number}"):
                status, answer, _ = ask(port, "GET", f"/api/{SAE}/{path}")
                read.append(path)
                if status != 200:
                    problems.append((path, answer))

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for number in range(30):
        status, answer, _ = ask(port, "PUT", f"/api/{SAE}/label/{number + 100}", {"label": f"writing {number}"})
        if status != 200:
            problems.append((number, answer))
    done.set()
    for thread in threads:
        thread.join()
    assert not problems and len(read) >= 50
    _, page, _ = ask(port, "GET", f"/api/{SAE}/features?labelled=true&limit=500")
    assert {line["feature"]: line["label"] for line in page["lines"]} == {n + 100: f"writing {n}" for n in range(30)}


def test_a_missing_or_damaged_index_gets_a_line(index_folder: Path, tmp_path: Path, port: int) -> None:
    copy = shutil.copytree(index_folder, tmp_path / "index")
    (copy / "features.parquet").write_bytes(b"")
    other = shutil.copytree(index_folder, tmp_path / "other")
    (other / "manifest.json").write_text("{")
    labels = shutil.copytree(index_folder, tmp_path / "labels", ignore=shutil.ignore_patterns("labels.sqlite*"))
    (labels / "labels.sqlite").write_bytes(b"no database " * 500)
    for folder, said in ((tmp_path / "nothing", "no feature index"), (copy, "damaged"), (other, "damaged"),
                         (labels, "is damaged or not a labels file")):
        with pytest.raises(UserError, match=said):
            serve(folder, None, 0, open_browser=False)
    with pytest.raises(UserError, match=f"port {port} cannot be used"):
        serve(index_folder, None, port, open_browser=False)
    with pytest.raises(UserError, match="cannot load model"):
        serve(index_folder, str(tmp_path / "no-model"), 0, open_browser=False)


def test_a_mistake_is_one_line_and_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "olmoscope", "browse", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs uvicorn.*olmoscope\[browse\]"):
        require_extra()


def test_several_indexes_in_one_page(index_folder: Path, tmp_path: Path, page: Page) -> None:
    shutil.copytree(index_folder, tmp_path / "one")
    shutil.copytree(index_folder, tmp_path / "two")
    with browse_server(tmp_path) as port:
        saes: Any = ask(port, "GET", "/api/saes")[1]["saes"]
        assert [one["slug"] for one in saes] == [SAE, f"{SAE}-2"]
        ask(port, "PUT", f"/api/{SAE}-2/label/1", {"label": "quetzal"})
        assert ask(port, "GET", f"/api/{SAE}-2/feature/1")[1]["entry"]["label"] == "quetzal"
        page.goto(f"http://127.0.0.1:{port}/#/{SAE}/features?labelled=true")
        expect(page.get_by_test_id("found")).to_contain_text(" of 512 features")
        page.get_by_test_id("sae").select_option(f"{SAE}-2")
        expect(page.locator("main")).to_have_attribute("data-drawn", f"#/{SAE}-2/features")
        page.get_by_test_id("jump").fill("quetzal")
        expect(page.get_by_test_id("found")).to_contain_text("1 of 512 features")
        expect(page.get_by_test_id("line")).to_have_attribute("data-feature", "1")
