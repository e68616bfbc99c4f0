"""Links between files of the repository, as links of the site.

Pages are written for a reader of the repository: they link `../benchmarks/README.md`, and that page links
`../docs/metrics.md`. Some documents outside docs/ are pages of the site as well: a page whose only content is
`<!-- document: PATH -->` shows the document at that path of the repository. A link to a file that is no page of the
site becomes the file's path in the repository.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = re.compile(r"<!-- document: (\S+) -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`(?!\]))", re.DOTALL | re.MULTILINE)


def shown_documents() -> dict[Path, Path]:
    """The page of each document that is shown: both as paths of files."""
    pages = {page: SHOWN.search(page.read_text(encoding="utf-8")) for page in sorted(DOCS.rglob("*.md"))}
    return {ROOT / found[1]: page for page, found in pages.items() if found}


def as_site_links(text: str, document: Path, page: Path, shown: dict[Path, Path]) -> str:
    """The text of a document as a page of the site has it."""

    def link(match: re.Match[str]) -> str:
        image, label, address = match.groups()
        path, hash_, anchor = address.partition("#")
        if "://" in address or not path:
            return match[0]
        target = (document.parent / path).resolve()
        target = shown.get(target, target)
        if image or target.is_relative_to(DOCS):
            return f"{image}[{label}]({os.path.relpath(target, page.parent)}{hash_}{anchor})"
        name = str(target.relative_to(ROOT))
        return f"`{name}`" if label.strip("`") in name else f"{label} (`{name}`)"

    parts = CODE.split(text)
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def rewrite(app: Sphinx, name: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return
    found = SHOWN.search(source[0])
    document = ROOT / found[1] if found else page
    text = document.read_text(encoding="utf-8") if found else source[0]
    source[0] = as_site_links(text, document, page, app.shown_documents)  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, bool]:
    app.shown_documents = shown_documents()  # type: ignore[attr-defined]
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}
