"""How fast a feature is painted, and how fast the server answers: the page in Chromium, on loopback.

    python benchmarks/browse.py OUT [--times 21]

OUT holds a feature index. Each measurement uses a new tab with an empty cache. The clock is the browser's own, from the
start of navigation to the mark that the page sets when its first view is drawn. The floor is the page's files without a
view.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

BAR_MS = 300


def painted(browser: Browser, address: str) -> float:
    """Milliseconds from the start of navigation to the drawn view."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("main[data-drawn]")
    mark: float = page.evaluate("performance.getEntriesByName('olmoscope:drawn')[0].startTime")
    context.close()
    return mark


def fetched(address: str) -> float:
    """Duration of one request in milliseconds."""
    begin = time.perf_counter()
    urllib.request.urlopen(address).read()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=21)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "olmoscope", "browse", str(arguments.out), "--no-open", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    base = next(word for word in server.stdout.readline().split() if word.startswith("http"))
    try:
        slug = json.load(urllib.request.urlopen(base + "api/saes"))["saes"][0]["slug"]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            views = {"feature": f"#/{slug}/feature/12", "list": f"#/{slug}/features", "no view (floor)": "#/x/y"}
            taken = {name: [painted(browser, base + view) for _ in range(arguments.times)]
                     for name, view in views.items()}
            browser.close()
        for name, values in taken.items():
            print(f"{name:18} painted after {statistics.median(values):6.0f} ms (min {min(values):.0f}, "
                  f"max {max(values):.0f}); bar {BAR_MS}")
        for path in (f"api/{slug}/feature/12", f"api/{slug}/features", f"api/{slug}/features?search=path&sort=max",
                     f"api/{slug}/around/12"):
            values = [fetched(base + path) for _ in range(arguments.times)]
            print(f"{path.split('/', 2)[2]:32} {statistics.median(values):6.1f} ms (min {min(values):.1f})")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
