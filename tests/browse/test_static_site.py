"""The static site works from static files behind a plain web server, and needs nothing else."""

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from test_page import SAE

from browse_server import ask
from browser import overflow
from olmoscope.browse.collection import open_collection
from olmoscope.browse.export import export_site
from olmoscope.errors import UserError
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.scores import Figure, Scores

LABEL = "<b>bold</b> \u202e label"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(index_folder: Path, port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ask(port, "PUT", f"/api/{SAE}/label/9", {"label": LABEL, "note": "why"})
    proposals = Proposals(index_folder / PROPOSALS_FILE, 512)
    for feature, value in ((40, 0.5), (41, 0.9), (42, None)):
        figure = None if value is None else Figure(value, value - 0.1, value + 0.1)
        proposals.add(feature, Labelled("a guess", Scores(figure)), "rules 1", "split")
    return export_site(open_collection(index_folder, None), tmp_path_factory.mktemp("site") / "below").folder


@pytest.fixture(scope="module")
def site_port(site: Path) -> Iterator[int]:
    handler = functools.partial(_Quiet, directory=str(site.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def test_the_site_in_a_browser(page: Page, site_port: int, port: int) -> None:
    page.goto(f"http://127.0.0.1:{site_port}/below/")
    lines = page.get_by_test_id("line")
    expect(lines).to_have_count(50)
    page.get_by_test_id("sort-feature").click()
    expect(lines.first).to_have_attribute("data-feature", "0")
    page.get_by_test_id("jump").fill("bold")
    expect(page.get_by_test_id("found")).to_have_text("1 of 512 features")
    lines.first.locator("a").click()
    expect(page.get_by_test_id("title")).to_have_text("Feature 9")
    assert page.get_by_test_id("label").inner_text().startswith("<b>bold</b> U+202E")
    expect(page.get_by_test_id("edit-label")).to_have_count(0)
    assert page.get_by_role("link", name="Steer").count() == 0
    assert overflow(page) == 0
    for query in ("sort=max", "search=wo&sort=mean&descending=false", "min_density=0.01&dead=false", "token=is",
                  "labelled=false&sort=feature", "sort=score", "sort=score&descending=false", "min_score=0",
                  "min_score=0.8&sort=score"):
        _, wanted, _ = ask(port, "GET", f"/api/{SAE}/features?{query}")
        page.goto(f"http://127.0.0.1:{site_port}/below/#/{SAE}/features?{query}")
        page.reload()
        expect(lines).to_have_count(len(wanted["lines"]))
        numbers = lines.evaluate_all("all => all.map((one) => Number(one.dataset.feature))")
        assert numbers == [line["feature"] for line in wanted["lines"]], query
    number = ask(port, "GET", f"/api/{SAE}/features?limit=1")[1]["lines"][0]["feature"]
    page.goto(f"http://127.0.0.1:{site_port}/below/#/{SAE}/feature/{number}")
    _, feature, _ = ask(port, "GET", f"/api/{SAE}/feature/{number}")
    expect(page.get_by_test_id("title")).to_have_text(f"Feature {number}")
    strongest = page.get_by_test_id("example").first.locator(".t.at")
    assert float(strongest.get_attribute("data-value") or "") == pytest.approx(feature["max"], rel=1e-7)
    page.get_by_test_id("expand").first.click()
    page.keyboard.press("a")
    expect(page.get_by_test_id("evaluation")).to_be_visible()


def test_the_same_index_gives_the_same_bytes(site: Path, index_folder: Path, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    export_site(open_collection(index_folder, None), tmp_path / "new")
    assert files(tmp_path / "new") == files(site)
    (site / "data" / SAE / "features" / "part-99.json.gz").write_bytes(b"of an older index")
    again = export_site(open_collection(index_folder, None), site)
    assert files(tmp_path / "new") == files(site), "what is left of an older site is gone"
    assert again.features == 512 and again.bytes / 512 < 8000
    part = json.loads(gzip.decompress((site / "data" / SAE / "features" / "part-00.json.gz").read_bytes()))
    assert len(part["features"]) == 32


def test_nothing_but_a_site_is_replaced(index_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a site of olmoscope"):
        export_site(open_collection(index_folder, None), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
