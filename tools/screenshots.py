"""Pictures for the README, taken in a real browser from the demo's output.

    olmoscope demo
    .venv/bin/python tools/screenshots.py olmoscope-demo

Needs Debian's chromium (tools/install_browser.sh).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LARGEST = 150_000
"""Most bytes of a picture, since every clone downloads it."""


def report(page: Page, out: Path) -> None:
    """The top of one SAE's report."""
    page.set_viewport_size({"width": 1180, "height": 100})
    page.goto(max((out / "runs").rglob("report.html")).resolve().as_uri())
    end = page.locator("section").nth(1).bounding_box()
    assert end is not None
    page.set_viewport_size({"width": 1180, "height": round(end["y"] + end["height"] + 20)})


def browse(page: Page, out: Path) -> None:
    """A feature in the page of `olmoscope browse`: the strongest of those that rarely fire."""
    command = [sys.executable, "-m", "olmoscope", "browse", str(out), "--no-open", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        base = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        slug = page.request.get(f"{base}api/saes").json()["saes"][-1]["slug"]
        seldom = page.request.get(f"{base}api/{slug}/features?max_density=0.005&sort=max&limit=1").json()["lines"][0]
        page.set_viewport_size({"width": 1180, "height": 640})
        page.goto(f"{base}#/{slug}/feature/{seldom['feature']}")
        page.wait_for_selector("main[data-drawn]")
        page.wait_for_selector("text=/ of /")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Take all pictures again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the demo's output folder")
    out = parser.parse_args().out
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, show in {"report": report, "browse": browse}.items():
            page = browser.new_page(color_scheme="light")
            show(page, out)
            path = IMAGES / f"{name}.png"
            page.screenshot(path=path)
            assert path.stat().st_size < LARGEST, f"{path} has {path.stat().st_size} bytes"
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
