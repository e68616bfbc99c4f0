"""Tokens that hold anything: markup, scripts, bidi marks, NULs, 10,000 characters. All are shown, as text."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect
from test_page import HOSTILE, SAE, open_page

from browse_server import ask, browse_server
from browser import overflow
from olmoscope.features.read import FeatureIndex
from olmoscope.files import sha256

HIDDEN = re.compile("[\0\x1b\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def with_texts(index: Path, texts: list[str]) -> None:
    """Give an index's tokens other texts, in turn, as if its tokenizer had been made of them."""
    vocabulary = pq.read_table(index / "corpus" / "vocabulary.parquet")
    hostile = [texts[number % len(texts)] for number in range(len(vocabulary))]
    column = vocabulary.schema.get_field_index("text")
    pq.write_table(vocabulary.set_column(column, "text", pa.array(hostile)), index / "corpus" / "vocabulary.parquet")
    listing = pq.read_table(index / "features.parquet")
    for name in ("tokens", "promoted", "suppressed"):
        lists = [[texts[(number + place) % len(texts)] for place in range(len(old))]
                 for number, old in enumerate(listing[name].to_pylist())]
        listing = listing.set_column(listing.schema.get_field_index(name), name, pa.array(lists, pa.list_(pa.string())))
    pq.write_table(listing, index / "features.parquet")
    manifest = json.loads((index / "manifest.json").read_text())
    for name in ("corpus/vocabulary.parquet", "features.parquet"):
        manifest["files"][name] = {"sha256": sha256(index / name), "bytes": (index / name).stat().st_size}
    (index / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def hostile_port(index_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    run = shutil.copytree(index_folder.parent, tmp_path_factory.mktemp("hostile") / "run",
                          ignore=shutil.ignore_patterns("labels.sqlite*"))
    with_texts(run / "index", HOSTILE)
    with browse_server(run) as port:
        yield port


def test_hostile_tokens_are_text_everywhere(page: Page, hostile_port: int) -> None:
    _, listed, _ = ask(hostile_port, "GET", f"/api/{SAE}/features?limit=1")
    number = listed["lines"][0]["feature"]
    prompt = "prompt?text=word1%20is%20any%20of%20many%20different%20things,%20or%20not:%20(x)%20=%20[y]"
    for address in ("features", "features?search=%3Cscript", f"feature/{number}", prompt):
        open_page(page, hostile_port, f"#/{SAE}/{address}")
        expect(page.locator("main")).to_contain_text("<img src=x")
        assert not HIDDEN.search(page.locator("main").inner_text()), address
        assert page.locator("main :is(img, script, iframe, b)").count() == 0
        assert overflow(page) == 0, address
        assert page.title().endswith("Olmoscope")
    open_page(page, hostile_port, f"#/{SAE}/feature/{number}")
    example = page.get_by_test_id("example").first
    example.get_by_test_id("expand").click()
    expect(page.locator("main")).to_contain_text("…+9,")  # of the long token, which is cut
    for token in example.locator(".t").all()[:8]:
        token.hover()
        expect(page.locator("#tip")).to_be_visible()
        assert not HIDDEN.search(page.locator("#tip").inner_text())


def test_a_hostile_feature_copied_as_markdown(page: Page, hostile_port: int) -> None:
    ask(hostile_port, "PUT", f"/api/{SAE}/label/3", {"label": HOSTILE[0] + "\n# [x](javascript:1)", "note": "`code`"})
    _, listed, _ = ask(hostile_port, "GET", f"/api/{SAE}/features?limit=1")
    number = listed["lines"][0]["feature"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for copied in (3, number):
        open_page(page, hostile_port, f"#/{SAE}/feature/{copied}")
        page.get_by_test_id("copy").click()
        page.get_by_test_id("copy-markdown").click()
        expect(page.locator("#status")).to_contain_text("copied")
        text = page.evaluate("navigator.clipboard.readText()")
        assert text.startswith(f"## Feature {copied}") and not HIDDEN.search(text)
        outside_code = re.sub(r"(`+) ?.*? ?\1(?!`)", "", text)
        assert not re.search(r"(?<!\\)<(?!http://127)|(?<!\\)\]\(|\n# ", outside_code), text
    page.get_by_test_id("copy-json").click()
    copied_json = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied_json["feature"] == number and copied_json["max"] == ask(
        hostile_port, "GET", f"/api/{SAE}/feature/{number}")[1]["max"]


def test_the_index_was_really_hostile(index_folder: Path, tmp_path: Path) -> None:
    index = shutil.copytree(index_folder, tmp_path / "index", ignore=shutil.ignore_patterns("labels.sqlite*"))
    with_texts(index, HOSTILE)
    assert FeatureIndex(index).tokens.text(5) == HOSTILE[5]
    assert max(map(len, FeatureIndex(index).tokens.texts(np.arange(8)))) == 10_000
