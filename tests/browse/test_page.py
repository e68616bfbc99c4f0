"""The page in a real browser: list, search, feature, keys, labels; hostile text; small and dark windows."""

import math
import re
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from browse_server import ask
from browser import Browser, overflow, violations
from olmoscope.labelling.labeller import Labelled
from olmoscope.labelling.proposals import PROPOSALS_FILE, Proposals
from olmoscope.labelling.scores import Figure, Scores

SAE = "layer_01-width_512-topk_8_raw"
HOSTILE = ["<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>",
           "a\0b\x1b[31m c", "\u202edesrever\u202c \u200b\u2066x", "👩‍💻 emoji ok", "javascript:alert(1)", "x" * 10_000,
           "line one\nline two\ttab", "&lt;b&gt; &amp; {{1+1}} ${1}"]


def open_page(page: Page, port: int, address: str = "") -> None:
    """Go to an address within the page and wait until it is drawn."""
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{port}/{address}")
    page.wait_for_selector("main[data-drawn]")


def drawn(page: Page) -> None:
    """Wait until the content of the address is drawn."""
    expect(page.locator("main")).to_have_attribute("data-drawn", page.evaluate("location.hash"))


def test_list_sort_filter_search_and_pages(page: Page, port: int) -> None:
    open_page(page, port)
    lines = page.get_by_test_id("line")
    expect(lines).to_have_count(50)
    expect(page.get_by_test_id("found")).to_have_text("512 features, most telling first")
    _, dense, _ = ask(port, "GET", f"/api/{SAE}/features?sort=density&limit=500&dead=false")
    telling = {line["feature"]: -line["max"] * math.log(line["density"]) for line in dense["lines"]}
    assert int(lines.first.get_attribute("data-feature")) == max(telling, key=telling.get)
    page.get_by_test_id("sort-feature").click()
    expect(lines.first).to_have_attribute("data-feature", "0")
    page.get_by_test_id("next-page").click()
    expect(lines.first).to_have_attribute("data-feature", "50")
    assert "offset=50" in page.url and "sort=feature" in page.url
    page.reload()
    expect(lines.first).to_have_attribute("data-feature", "50")

    page.get_by_test_id("filter-dead").select_option("true")
    expect(lines.first).to_have_class("dead")
    page.get_by_test_id("filter-dead").select_option("false")
    page.get_by_test_id("filter-min_density").fill("1 %")
    page.wait_for_url("**min_density=0.01**")
    expect(page.get_by_test_id("found")).to_have_text(re.compile(r"^\d+ of 512 features$"))
    _, found, _ = ask(port, "GET", f"/api/{SAE}/features?min_density=0.01&dead=false")
    expect(page.get_by_test_id("found")).to_have_text(f"{found['total']} of 512 features")

    open_page(page, port)
    page.get_by_test_id("jump").press_sequentially("word", delay=20)
    page.wait_for_url("**search=word**")
    expect(page.get_by_test_id("found")).to_have_text(re.compile(r"of 512 features"))
    assert page.evaluate("document.activeElement.dataset.testid") == "jump", "typing goes on"
    page.get_by_test_id("jump").fill("nothing is called like this")
    expect(page.get_by_test_id("nothing")).to_be_visible()


def test_a_feature_shows_what_the_index_has(page: Page, port: int) -> None:
    _, listed, _ = ask(port, "GET", f"/api/{SAE}/features?limit=3")
    number = listed["lines"][0]["feature"]
    _, feature, _ = ask(port, "GET", f"/api/{SAE}/feature/{number}")
    open_page(page, port, f"#/{SAE}/feature/{number}")
    expect(page.get_by_test_id("title")).to_have_text(f"Feature {number}")
    expect(page.get_by_test_id("fact-density")).to_have_attribute("data-tip", re.compile(r"^0\.\d+$"))
    assert float(page.get_by_test_id("fact-max").get_attribute("data-tip") or "") == feature["max"]
    top = feature["groups"][0]["examples"][0]
    shown = page.get_by_test_id("example").first
    values = shown.locator(".t").evaluate_all("all => all.map((one) => Number(one.dataset.value ?? 0))")
    assert values == pytest.approx(top["values"], rel=1e-12)
    strongest = shown.locator(".t.at")
    strongest.hover()
    expect(page.locator("#tip")).to_contain_text(str(top["value"])[:8])
    for name in ("promoted", "suppressed"):
        expect(page.get_by_test_id(name).locator("li")).to_have_count(len(feature[name]))
    assert page.locator("svg.chart").count() >= 1

    cut = next(place for place, example in enumerate(feature["groups"][0]["examples"])
               if example["more_before"] or example["more_after"])  # some sequences are already shown whole
    shown = page.get_by_test_id("example").nth(cut)
    before = shown.locator(".t").count()
    shown.get_by_test_id("expand").click()
    expect(shown.get_by_test_id("expand")).to_have_attribute("aria-expanded", "true")
    assert shown.locator(".t").count() > before
    shown.get_by_test_id("expand").click()
    expect(shown.locator(".t")).to_have_count(before)

    neighbour = feature["neighbours"][0]["feature"]
    page.locator("aside a", has_text=re.compile(rf"^{neighbour}$")).first.click()
    expect(page.get_by_test_id("title")).to_have_text(f"Feature {neighbour}")
    page.go_back()
    expect(page.get_by_test_id("title")).to_have_text(f"Feature {number}")


def test_keys(page: Page, port: int) -> None:
    open_page(page, port, f"#/{SAE}/feature/5?sort=feature&descending=false")
    expect(page.get_by_test_id("next")).to_have_attribute("href", re.compile("feature/6"))
    page.keyboard.press("j")
    expect(page.get_by_test_id("title")).to_have_text("Feature 6")
    expect(page.get_by_test_id("previous")).to_have_attribute("href", re.compile("feature/5"))
    page.keyboard.press("k")
    expect(page.get_by_test_id("title")).to_have_text("Feature 5")
    page.keyboard.press("?")
    expect(page.get_by_test_id("help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("help")).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.type("17")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("title")).to_have_text("Feature 17")
    page.keyboard.press("r")
    expect(page.get_by_test_id("title")).not_to_have_text("Feature 17")
    page.keyboard.press("f")
    expect(page.get_by_test_id("list")).to_be_visible()
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('tr') !== null")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("title")).to_be_visible()


def test_labels_are_written_by_keys_and_kept(page: Page, port: int) -> None:
    open_page(page, port, f"#/{SAE}/feature/20")
    expect(page.get_by_test_id("label")).to_have_text("no label yet")
    page.keyboard.press("l")
    page.keyboard.type("first idea")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("label")).to_have_text("first idea")
    page.keyboard.press("l")
    page.get_by_test_id("label-input").fill("better idea")
    page.get_by_test_id("note-input").fill("seen on\ntwo lines")
    page.get_by_test_id("save-label").click()
    expect(page.get_by_test_id("note")).to_have_text("seen ontwo lines")
    page.reload()
    expect(page.get_by_test_id("label")).to_have_text("better idea")
    page.get_by_test_id("history").click()
    expect(page.get_by_test_id("history-list").locator("li")).to_have_count(2)
    expect(page.get_by_test_id("history-list")).to_contain_text("first idea")
    page.keyboard.press("Escape")
    open_page(page, port, f"#/{SAE}/features?labelled=true")
    expect(page.get_by_test_id("line")).to_have_count(1)


def test_hostile_text_is_shown_as_text(page: Page, port: int) -> None:
    for number, text in enumerate(HOSTILE):
        ask(port, "PUT", f"/api/{SAE}/label/{40 + number}", {"label": text, "note": text})
        open_page(page, port, f"#/{SAE}/feature/{40 + number}")
        shown = page.get_by_test_id("label").inner_text()
        assert shown.strip()[:5] == text.replace("\0", "␀").replace("\x1b", "␛").replace("\u202e", "U+202E").strip()[:5]
        assert not re.search("[\0\u202a-\u202e\u2066-\u2069\x1b]", page.locator("main").inner_text())
    open_page(page, port, f"#/{SAE}/features?labelled=true")
    assert page.title().endswith("Olmoscope")
    for text in HOSTILE:
        hostile = quote(text[:2000], safe="")
        for address in (f"#/{SAE}/features?search={hostile}", f"#/{SAE}/features?token={hostile}&sort=max",
                        f"#/{SAE}/feature/{hostile}", f"#/{hostile}/features", f"#/{SAE}/{hostile}"):
            page.goto(f"http://127.0.0.1:{port}/{address}")
            drawn(page)
            assert "owned" not in page.title()
            assert page.locator("main img, main script, main iframe").count() == 0
    for text in ("%", "%E0%A4%A", "#", "?&=;"):
        page.goto(f"http://127.0.0.1:{port}/#/{SAE}/{text}/{text}?{text}")
        drawn(page)


def test_proposed_labels_are_compared_and_judged_by_keys(page: Page, port: int, index_folder: Path) -> None:
    proposals = Proposals(index_folder / PROPOSALS_FILE, 512)
    for label, value, labeller in (("a rule <b>", 0.71, "rules 1"), ("a guess", 0.93, "some model")):
        figure = Figure(value, value - 0.05, value + 0.02)
        proposals.add(30, Labelled(label, Scores(figure, {}, fuzzing=figure)), labeller, "split")
    open_page(page, port, f"#/{SAE}/features?sort=score")
    first = page.get_by_test_id("line").first
    expect(first).to_have_attribute("data-feature", "30")
    expect(first.locator("td.label")).to_have_text("0.93 0.88–0.95 a guess")
    expect(first.locator("td.label .score")).to_have_attribute("data-tip", re.compile("proposed by some model"))
    open_page(page, port, f"#/{SAE}/features?min_score=0.95")
    expect(page.get_by_test_id("nothing")).to_be_visible()

    open_page(page, port, f"#/{SAE}/feature/30")
    expect(page.get_by_test_id("label")).to_have_text("a guess")
    rows = page.get_by_test_id("proposal")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("0.93 0.88 – 0.95")
    assert not violations(page)
    page.keyboard.press("x")
    expect(page.get_by_test_id("label")).to_have_text("a rule <b>")
    page.keyboard.press("a")
    expect(rows.first.get_by_test_id("accepted")).to_have_attribute("aria-pressed", "true")
    assert [one.verdict for one in proposals.of(30)] == ["accepted", "rejected"]
    page.keyboard.press("l")
    page.get_by_test_id("label-input").fill("my own")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("label")).to_have_text("my own")
    assert len(proposals.of(30)) == 2, "what people write leaves proposals alone"


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1280, False)])
def test_it_fits_narrow_and_wide_windows_and_breaks_no_rule_of_accessibility(browser: Browser, port: int, width: int,
                                                                            dark: bool) -> None:
    page = browser.page(width=width, dark=dark)
    found = {}
    for address in ("features", "features?search=nothing+is+called+so", "feature/11", "about", "prompt?text=word1",
                    "steer?edits=11:add:4"):
        open_page(page, port, f"#/{SAE}/{address}")
        assert overflow(page) == 0, address
        found[address] = violations(page)
    page.keyboard.press("?")
    expect(page.get_by_test_id("help")).to_be_visible()
    found["help"] = violations(page)
    assert not any(found.values()), "\n".join(f"{address}: {said}" for address, said in found.items() if said)
