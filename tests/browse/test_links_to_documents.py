"""Report, model card and page link to each other, and only to documents that exist."""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest
from playwright.sync_api import expect
from test_page import SAE

from browse_server import ask, browse_server
from browser import Browser, overflow, violations
from olmoscope.browse.collection import open_collection
from olmoscope.browse.documents import documents, hub_page
from olmoscope.browse.export import export_site
from olmoscope.features.format import Info
from olmoscope.pipeline import release_saes

HOSTILE = "<script>alert(1)</script>"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def bare(index_folder: Path) -> list[str]:
    """The documents before there is a release."""
    [shown] = open_collection(index_folder, None).values()
    return documents(shown)


@pytest.fixture(scope="module")
def released(bare: list[str], index_folder: Path) -> Path:
    """The index's output folder, with a release. Somebody else's report is beside the SAE."""
    out = index_folder.parents[4]
    release_saes(out)
    (index_folder.parent / "report.html").write_text(HOSTILE)
    return out


@pytest.fixture(scope="module")
def live(released: Path, index_folder: Path) -> Iterator[str]:
    with browse_server(index_folder) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def static(released: Path, index_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    site = export_site(open_collection(index_folder, None), tmp_path_factory.mktemp("site") / "below").folder
    handler = functools.partial(_Quiet, directory=str(site.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/below/"
    server.shutdown()


def test_there_is_no_card_before_there_is_a_release(bare: list[str]) -> None:
    assert bare == ["report.html"]


@pytest.mark.parametrize(("which", "width", "dark"), [("live", 400, True), ("static", 1280, False)])
def test_every_link_of_page_and_report_leads_somewhere(browser: Browser, request: pytest.FixtureRequest, which: str,
                                                       released: Path, width: int, dark: bool) -> None:
    start = request.getfixturevalue(which)
    page = browser.page(width=width, dark=dark)
    page.goto(f"{start}#/{SAE}/about")
    links = page.get_by_test_id("documents").locator("a")
    expect(links).to_have_text(["Evaluation report", "Model card"])
    assert not violations(page) and overflow(page) == 0
    card = page.request.get(urljoin(start, links.last.get_attribute("href")))
    assert card.ok and card.text() == (released / "release" / "README.md").read_text()
    links.first.click()
    expect(page.locator("h1")).to_have_text("layer_01/width_512/topk_8_raw")
    expect(page.locator("#copy")).to_be_visible()  # its own script runs
    assert HOSTILE not in page.content()
    addresses = [urljoin(page.url, link.get_attribute("href")) for link in page.locator("a").all()]
    assert len(addresses) == 2 and all(page.request.get(address).ok for address in addresses)
    page.get_by_role("link", name="Page of features").click()
    expect(page.get_by_test_id("evaluation")).to_be_visible()


def test_the_server_sends_the_card_as_text_and_the_report_with_its_own_policy(live: str) -> None:
    port = int(live.rsplit(":", 1)[1].strip("/"))
    _, _, headers = ask(port, "GET", f"/api/{SAE}/card.md")
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    _, _, headers = ask(port, "GET", f"/api/{SAE}/report.html")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy


def test_what_is_not_there_is_said(index_folder: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(index_folder, tmp_path / "index")  # no SAE, no release beside it
    with browse_server(alone) as port:
        _, about, _ = ask(port, "GET", f"/api/{SAE}/about")
        assert about["documents"] == [] and about["hub"] is None
        status, said, _ = ask(port, "GET", f"/api/{SAE}/report.html")
        assert status == 400 and "is not evaluated" in said["error"]
        status, said, _ = ask(port, "GET", f"/api/{SAE}/card.md")
        assert status == 400 and "the SAE is not part of a release" in said["error"]


@pytest.mark.parametrize(("where", "page"), [
    ("OWNER/some-saes@main:layer_1", "https://huggingface.co/OWNER/some-saes"),
    ("OWNER/some-saes:a/b.safetensors", "https://huggingface.co/OWNER/some-saes"), ("saelens:a", None)])
def test_an_sae_of_the_hub_leads_to_its_page_there(index_folder: Path, where: str, page: str | None) -> None:
    [shown] = open_collection(index_folder, None).values()
    info = shown.index.info
    shown.index.info = Info.model_validate(info.model_dump() | {"sae": info.sae.model_copy(
        update={"kind": "hub", "where": where}).model_dump(exclude={"layer"})})
    assert hub_page(shown) == page and documents(shown) == []
