"""report.html in a real browser: it agrees with evaluation.json, fits any width, and runs no foreign scripts."""

import itertools
import json
import re

import pytest

from browser import overflow, violations
from commands import run_forked
from helpers import recipe, write_documents
from olmoscope.errors import UserError
from olmoscope.evaluate.cards import Shown
from olmoscope.evaluate.report import REPORT, report_of_folders, report_page, write_report, write_reports
from olmoscope.pipeline import collect_stores, evaluate_saes, report_saes, train_saes

HOSTILE = "</title><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }} & \"quoted\" " + "wide" * 40
LOOKS = list(itertools.product((1280, 400), (False, True)))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two SAEs of the tiny model, really trained and evaluated, with their reports."""
    folder = tmp_path_factory.mktemp("report")
    write_documents(folder / "corpus")
    job = recipe(folder / "corpus", train__log_every=1)
    out = folder / "out"
    collect_stores(job, out)
    list(train_saes(job, out, []))
    list(evaluate_saes(job, out, []))
    assert report_saes(job, out) == [out / "runs" / sae.id / REPORT for sae in job.saes] + [out / REPORT]
    return out


@pytest.fixture(scope="module")
def runs(out):
    return sorted(path.parent for path in out.rglob("evaluation.json"))


@pytest.fixture(scope="module")
def shown(runs):
    return report_of_folders(runs)


def look(page, path):
    page.goto(path.as_uri())
    assert page.locator("svg").count() >= 12
    boxes = [svg.bounding_box() for svg in page.locator("svg").all()]
    assert all(box["width"] > 250 and box["height"] > 60 for box in boxes)


def brightness(page):
    """The brightness of paper and ink, each from 0 to 765."""
    colours = [page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color")]
    return [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]


def number(text):
    """The value at the head of a cell's text."""
    value = float(re.match(r"[-\d.,e]+", text)[0].replace(",", ""))
    return value / 100 if "%" in text.split("\n")[0] else value


def test_reports_lead_to_each_other_and_to_the_page_of_features(page, out, runs):
    page.goto((out / REPORT).as_uri())
    assert page.get_by_test_id("links").locator("a").count() == 0, "there is no release"
    links = page.get_by_test_id("overview").locator("a")
    assert [link.inner_text() for link in links.all()] == ["layer_01/width_512/topk_8_raw",
                                                          "layer_07/width_512/topk_8_layernorm"]
    links.last.click()
    assert page.url == (runs[1] / REPORT).as_uri()
    page.get_by_role("link", name="All SAEs side by side").click()
    assert page.url == (out / REPORT).as_uri()
    commands = page.get_by_test_id("links").locator("code").all_inner_texts()
    assert commands == ["olmoscope index .", "olmoscope browse ."]
    assert run_forked("index", str(runs[1])).returncode == 0
    assert (runs[1] / "index" / "manifest.json").is_file()


def test_a_report_outside_an_output_folder_has_no_commands_and_links_to_nothing(tmp_path, runs):
    (tmp_path / "evaluation.json").write_bytes((runs[0] / "evaluation.json").read_bytes())
    [path] = write_reports([tmp_path], tmp_path)
    assert "<a " not in path.read_text() and "olmoscope browse" not in path.read_text()


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_it_fits_and_has_the_readers_colours(browser, out, runs, width, dark):
    for path in (runs[0] / REPORT, out / REPORT):
        page = browser.page(width=width, dark=dark)
        look(page, path)
        assert overflow(page) == 0
        assert not violations(page)
        paper, ink = brightness(page)
        assert (paper < ink) == dark
        for text in page.locator("svg text").all()[:40]:
            assert text.evaluate("e => e.getBoundingClientRect().height") >= 9, "too small to read"


def test_it_prints_dark_on_white(browser, out):
    page = browser.page(dark=True)
    page.emulate_media(media="print")
    look(page, out / REPORT)
    assert brightness(page)[0] == 3 * 255 and brightness(page)[1] < 150


def test_it_says_what_evaluation_json_says(page, runs):
    page.goto((runs[0] / REPORT).as_uri())
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())
    assert json.loads(page.locator("#data").text_content()) == [evaluation]
    flat = evaluation | evaluation["language"] | evaluation["density"] | {
        "l0": evaluation["l0"]["mean"], "dead": evaluation["dead"]["share"],
        "cosine_mean": evaluation["dictionary"]["mean"], "cosine_p95": evaluation["dictionary"]["p95"],
        "over_90_percent": evaluation["dictionary"]["over_90_percent"],
        "decoder_cosine": evaluation["dictionary"]["mean_absolute"]}
    intervals = evaluation["intervals"] | evaluation["language"]["intervals"]
    rows = {row.get_attribute("data-figure"): row.locator("td") for row in page.locator("tr[data-figure]").all()}
    assert len(rows) == 24
    for key, cell in rows.items():
        if flat[key] is None:
            assert cell.inner_text() == "none"
            continue
        assert number(cell.inner_text()) == pytest.approx(flat[key], rel=1e-3, abs=1e-4), key
        if key in intervals:
            said = [number(text) for text in cell.locator(".interval").inner_text().split(" – ")]
            assert said == pytest.approx(intervals[key], rel=1e-3, abs=1e-4), key
    tiles = page.get_by_test_id("tiles").inner_text()
    assert f"{evaluation['nmse']:#.4g}" in tiles and f"{evaluation['l0']['mean']:.1f}" in tiles
    subsets = page.get_by_test_id("subsets-1").locator("tbody tr")
    assert subsets.count() == 1 + len(evaluation["subsets"])
    for row, subset in zip(subsets.all(), [evaluation, *evaluation["subsets"].values()], strict=True):
        cells = [cell.inner_text() for cell in row.locator("td").all()]
        assert number(cells[1]) == subset["rows"]
        assert number(cells[3]) == pytest.approx(subset["nmse"], rel=1e-3)


def test_several_side_by_side(page, out, shown):
    page.goto((out / REPORT).as_uri())
    assert page.locator("h1").inner_text() == "2 SAEs compared"
    rows = page.get_by_test_id("overview").locator("tbody tr").all()
    assert [row.locator("td").first.inner_text().split("\n") for row in rows] == [
        [sae.letter, sae.name] for sae in shown]
    assert [number(row.locator("td").nth(3).inner_text()) for row in rows] == pytest.approx(
        [sae.evaluation.nmse for sae in shown], rel=1e-3)
    tips = page.locator("section").first.locator("svg").first.locator("title").all_text_contents()
    assert [tip.split("\n")[0] for tip in tips] == [f"{sae.letter}  {sae.name}" for sae in shown]
    assert [number(tip.split("\nFVU ")[1]) for tip in tips] == pytest.approx(
        [sae.evaluation.fvu for sae in shown], rel=1e-3)


def test_more_saes_than_colours(page, tmp_path, shown):
    many = [Shown(count, f"SAE {count}", sae.evaluation, sae.training)
            for count, sae in enumerate(shown * 5 + shown[:1], 1)]
    write_report(tmp_path / REPORT, many)
    page.goto((tmp_path / REPORT).as_uri())
    assert "Charts show the first 8" in page.locator("header").inner_text()
    assert page.get_by_test_id("overview").locator("tbody tr").count() == 11
    assert page.locator("section").first.locator("svg").first.locator("title").count() == 8
    assert [Shown(count, "", shown[0].evaluation, []).letter for count in (1, 26, 27, 53)] == ["A", "Z", "AA", "BA"]


def test_pointing_at_a_chart_tells_its_values(page, runs, shown):
    page.goto((runs[0] / REPORT).as_uri())
    chart = page.get_by_label("Training loss")
    chart.scroll_into_view_if_needed()
    assert not page.locator("#tip").is_visible()
    chart.locator(".hit rect").last.hover()
    last = shown[0].training[-1]
    assert page.locator("#tip").inner_text() == f"tokens {last.tokens:,}\n{last.loss:#.4g}"
    page.mouse.move(2, 2)
    assert not page.locator("#tip").is_visible()


def test_the_figures_can_be_copied(browser, runs):
    page = browser.page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto((runs[0] / REPORT).as_uri())
    page.get_by_role("button", name="Copy all figures").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == [
        json.loads((runs[0] / "evaluation.json").read_text())]


def test_nothing_is_lost_without_scripts(browser, runs):
    page = browser.page(scripts=False)
    page.goto((runs[0] / REPORT).as_uri())
    assert page.locator("tr[data-figure]").count() == 24
    assert page.locator("svg .hit title").count() > 50
    assert not page.locator("#copy").is_visible()


@pytest.mark.parametrize("count", [1, 2])
def test_names_stay_text(browser, tmp_path, shown, count):
    named = [Shown(sae.number, HOSTILE, sae.evaluation.model_copy(update={
        "sae": HOSTILE, "model": HOSTILE, "model_revision": HOSTILE, "architecture": HOSTILE,
        "subsets": {HOSTILE: sae.evaluation.subsets["without_first"]}}), sae.training) for sae in shown[:count]]
    write_report(tmp_path / REPORT, named)
    for width in (1280, 400):
        page = browser.page(width=width)
        look(page, tmp_path / REPORT)
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 2
        assert HOSTILE in page.locator("h1" if count == 1 else "header").text_content()
        assert json.loads(page.locator("#data").text_content())[0]["model"] == HOSTILE
        assert overflow(page) == 0


def test_the_page_needs_nothing_but_itself_and_allows_nothing_else(browser, runs):
    page = browser.page()
    text = (runs[0] / REPORT).read_text()
    assert not re.findall(r"https?://|@import|url\(|src=", text)
    page.goto((runs[0] / REPORT).as_uri())
    refused = page.evaluate("""() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.violatedDirective));
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
    })""")
    assert refused == "script-src-elem" and page.evaluate("window.ran") is None
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()  # made on purpose


def test_an_sae_whose_training_is_not_known(page, tmp_path, runs, shown):
    (tmp_path / "evaluation.json").write_bytes((runs[0] / "evaluation.json").read_bytes())
    write_report(tmp_path / REPORT, report_of_folders([tmp_path]))
    page.goto((tmp_path / REPORT).as_uri())
    assert "no metrics.jsonl of a run" in page.locator("main").inner_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "to')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        report_of_folders([tmp_path])


def test_the_same_evaluations_give_the_same_page(tmp_path, runs, shown):
    assert report_page(shown) == report_page(report_of_folders(runs))
    assert write_report(tmp_path / REPORT, shown)
    assert not write_report(tmp_path / REPORT, shown)


def test_what_is_not_evaluated_has_no_report(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.json is missing"):
        report_of_folders([tmp_path])
