"""The page as static files: list, features, search, for any web host; without a model, new labels, or more text.

    index.html, *.js, *.css            the page's own files; index.html says that this is a static site
    site.json                          what this folder is; written first
    data/SAE/about.json                the server's answer, and the number of features per part
    data/SAE/report.html, card.md      the report of its evaluation and the model card of its release, if there are any
    data/SAE/list.json.gz              the list, by columns
    data/SAE/features/part-0042.json.gz   some consecutive features and the texts of their tokens
    data/saes.json                     which SAEs there are; written last
"""

import gzip
import json
import shutil
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from olmoscope.browse.about import about_payload, summary_payload
from olmoscope.browse.collection import Shown
from olmoscope.browse.documents import CARD, REPORT, card_path, report
from olmoscope.browse.payload import feature_payload, figure_columns
from olmoscope.browse.security import CONTENT_POLICY
from olmoscope.errors import UserError
from olmoscope.features.labels import Entry
from olmoscope.files import atomic_file, read_json, write_json, write_text
from olmoscope.progress import bar

VERSION = 1
PER_PART = 32
"""Features per part; to show a feature, the page fetches its part."""
SHOWN = {"top": 10, "interval": 2, "random": 5}
BEFORE, AFTER = 24, 12
_LISTED = ("rows", "density", "max", "mean", "tokens", "promoted", "source")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    features: int
    bytes: int
    """The size of the data; the page's own files take another 100 kB."""


def export_site(collection: dict[str, Shown], out: Path) -> Exported:
    """Write a static site; this replaces an older one.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    _begin(out)
    static = resources.files("olmoscope") / "browse" / "static"
    for file in static.iterdir():
        if file.name != "index.html":
            write_text(out / file.name, file.read_text(encoding="utf-8"))
    marks = (f'<meta name="olmoscope-site" content="{VERSION}">\n'
             f'<meta http-equiv="content-security-policy" content="{CONTENT_POLICY}">\n')
    page = (static / "index.html").read_text(encoding="utf-8")
    write_text(out / "index.html", page.replace("<title>", marks + "<title>", 1))
    for shown in collection.values():
        _write_sae(shown, out / "data" / shown.slug)
    write_json(out / "data" / "saes.json", {"saes": [summary_payload(one) for one in collection.values()]})
    return Exported(out, sum(one.index.info.sae.d_sae for one in collection.values()),
                    sum(path.stat().st_size for path in (out / "data").rglob("*") if path.is_file()))


def _begin(out: Path) -> None:
    mark = {"format": "olmoscope site", "version": VERSION}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "site.json").is_file() or read_json(out / "site.json").get("format") != mark["format"]:
            raise UserError(f"{out} is not empty and is not a site of olmoscope; choose another folder for --export")
        shutil.rmtree(out / "data", ignore_errors=True)
    write_json(out / "site.json", mark)


def _write_sae(shown: Shown, folder: Path) -> None:
    count = shown.index.info.sae.d_sae
    parts = -(-count // PER_PART)
    entries, digits = shown.newest_labels(), len(str(parts - 1))
    labels, figures = shown.label_texts(), shown.label_figures()
    about = about_payload(shown)
    write_json(folder / "about.json", {**about, "per_part": PER_PART, "digits": digits})
    if REPORT in about["documents"]:
        write_text(folder / REPORT, report(shown))
    if (card := card_path(shown)) is not None:
        write_text(folder / CARD, card.read_text(encoding="utf-8"))
    lines = shown.index.table(sort="feature", descending=False, limit=count).lines
    columns: dict[str, list[Any]] = {name: [getattr(line, name) for line in lines] for name in _LISTED}
    proposed = [figure_columns(figures.get(number)) for number in range(count)]
    _write_gzip(folder / "list.json.gz", {**columns, "label": [labels.get(number, "") for number in range(count)],
                                          **{name: [one[name] for one in proposed] for name in proposed[0]}})
    with bar(f"exporting {shown.slug}", count, "features") as advance:
        for part in range(parts):
            numbers = range(part * PER_PART, min((part + 1) * PER_PART, count))
            _write_gzip(folder / "features" / f"part-{part:0{digits}d}.json.gz", _part(shown, numbers, labels, entries))
            advance(len(numbers))


def _part(shown: Shown, numbers: range, labels: dict[int, str], entries: dict[int, Entry]) -> dict[str, Any]:
    features, texts = [], {}
    for number in numbers:
        payload = feature_payload(shown.index, number, labels, before=BEFORE, after=AFTER, shown=SHOWN)
        texts.update(payload.pop("texts"))
        entry = entries.get(number)
        proposed = [] if shown.proposals is None else shown.proposals.of(number)
        features.append({**payload, "entry": entry and asdict(entry), "proposals": [asdict(one) for one in proposed]})
    return {"features": features, "texts": texts}


def _write_gzip(path: Path, value: Any) -> None:
    """Compressed JSON, with the same bytes whenever it is written."""
    text = json.dumps(_shortened(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    with atomic_file(path) as file:
        file.write(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def _shortened(value: Any) -> Any:
    """Numbers from float32, with as many digits as a float32 has."""
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 2**24:
            return int(value)
        single = np.float32(value)
        return float(str(single)) if float(single) == value else value
    if isinstance(value, dict):
        return {key: _shortened(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(one) for one in value]
    return value
