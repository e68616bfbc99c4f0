"""Documents of Debian packages: pages of HTML as plain text, section by section, and the entries of a dictd dictionary.

An id is `PACKAGE/PAGE#SECTION`: the part before `#` decides whether a document is held out (text/split.py), so the
sections of a page are never split between training and evaluation.
"""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LEAST = 200
"""Minimum characters of a section; shorter ones (only a heading, or a list of links) are left out."""
HEADINGS = ("h1", "h2", "h3")
"""Elements at which a section begins."""
BLOCKS = ("p", "div", "blockquote", "li", "dt", "dd", "tr", "pre", "table", "ul", "ol", "h4", "h5", "hr", *HEADINGS)
"""Elements that begin and end on a line of their own."""
UNREAD = ("head", "script", "style")
"""Elements whose text is left out."""
NAVIGATION = ("navheader", "navfooter", "toc", "book-navigation")
"""Classes of a `div` that holds only links."""
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""The digits of the numbers in a dictd index."""


class Page(HTMLParser):
    """The sections of a page: `feed` it, then read `sections`."""

    def __init__(self) -> None:
        """Begin a page."""
        super().__init__(convert_charrefs=True)
        self._sections: list[list[str]] = [[]]
        """Pieces of text of each section; `\\0` marks the edge of a block, `\\x01` the end of a line."""
        self._skipping: list[str] = []
        """Open elements inside one that is left out, starting with itself."""
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Break the line or begin a section where the element does."""
        unread = tag in UNREAD or (tag == "div" and (dict(attrs).get("class") or "") in NAVIGATION)
        if self._skipping or unread:
            if unread or tag == self._skipping[0]:
                self._skipping.append(tag)
            return
        if tag in HEADINGS:
            self._sections.append([])
        elif tag in BLOCKS or tag == "br":
            self._sections[-1].append("\x01" if tag == "br" else "\0")
        elif tag in ("td", "th"):
            self._sections[-1].append(" ")
        self._verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """Break the line where the element does."""
        if self._skipping:
            if tag in self._skipping:
                del self._skipping[len(self._skipping) - 1 - self._skipping[::-1].index(tag)]
            return
        if tag in BLOCKS:
            self._sections[-1].append("\0")
        self._verbatim -= tag == "pre" and self._verbatim > 0

    def handle_data(self, data: str) -> None:
        """Keep the text; line breaks matter only in verbatim text."""
        if not self._skipping:
            self._sections[-1].append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def sections(self) -> list[str]:
        """Plain text of each section that is long enough, its heading first; empty lines separate blocks."""
        found = []
        for pieces in self._sections:
            text = re.sub(r" *\x01 *", "\n", re.sub(r" *\0[ \0]*", "\n\n", "".join(pieces)))
            text = re.sub(r"\n\s*\n", "\n\n", re.sub(r"[ \t\r]+\n", "\n", text)).strip()
            if len(text) >= LEAST:
                found.append(text)
        return found


def pages(folder: Path, package: str) -> Iterator[dict[str, str]]:
    """Every section of the HTML pages below a folder, in order of their names, as `{"id": ..., "text": ...}`."""
    for path in sorted(folder.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.close()
        for number, text in enumerate(page.sections()):
            yield {"id": f"{package}/{path.relative_to(folder).as_posix()}#{number}", "text": text}


def entries(folder: Path, package: str) -> Iterator[dict[str, str]]:
    """Every entry of the dictd dictionaries below a folder; names that lead to the same entry count once."""
    for index in sorted(folder.rglob("*.index")):
        content = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
        places: dict[tuple[int, int], str] = {}
        for line in index.read_text(encoding="utf-8").splitlines():
            name, begins, long = line.split("\t")[:3]
            if not name.startswith("00"):  # the dictionary's own name and source
                places.setdefault((_number(begins), _number(long)), name)
        for (start, length), name in sorted(places.items()):
            lines = content[start:start + length].decode("utf-8", errors="replace").strip("\n").splitlines()
            text = "\n".join(line.removeprefix("   ") for line in lines).replace("%%%", ", ")
            yield {"id": f"{package}/{name}", "text": re.sub(r"[{}]", "", text)}


def _number(text: str) -> int:
    number = 0
    for character in text:
        number = number * 64 + DIGITS.index(character)
    return number
