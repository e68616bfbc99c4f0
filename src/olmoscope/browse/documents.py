"""Documents about an index's SAE: the report of its evaluation, the model card of its release, its page on the hub.

    report.html     made on request, from the evaluation.json beside the SAE. A report.html beside it is never served:
                    others may have written it, and the page runs no scripts of others
    card.md         the README.md of the release that has the SAE, unchanged; browsers show it as text
"""

import re
from pathlib import Path
from urllib.parse import quote

from olmoscope.browse.collection import Shown
from olmoscope.errors import UserError
from olmoscope.evaluate.report import report_of_folders, report_page
from olmoscope.evaluate.report_links import Links
from olmoscope.evaluate.results import EVALUATION
from olmoscope.features.format import sae_place

REPORT, CARD = "report.html", "card.md"
_OF_A_RELEASE = ("README.md", "manifest.json", "saelens_pretrained_saes.yaml")


def documents(shown: Shown) -> list[str]:
    """The names of the documents that exist, at most REPORT and CARD."""
    found = {REPORT: _evaluated(shown), CARD: card_path(shown)}
    return [name for name, path in found.items() if path is not None]


def report(shown: Shown) -> str:
    """The report of the SAE's evaluation, with links to its card and back to the page.

    Raises:
        UserError: the SAE is not evaluated, or its evaluation.json is damaged.
    """
    folder = _evaluated(shown)
    if folder is None:
        raise UserError(f"{shown.index.info.sae.name} is not evaluated; run `olmoscope evaluate` first")
    back = ("Page of features", f"../../index.html#/{quote(shown.slug)}/about")
    card = [("Model card of the release", CARD)] if card_path(shown) else []
    return report_page(report_of_folders([folder]), links=Links([back, *card]))


def card_path(shown: Shown) -> Path | None:
    """The model card of the release that has the SAE: the SAE's folder is in it, or it was built from the SAE's run."""
    place = _folder(shown)
    if place is None:
        return None
    for parent in place.parents:
        if _is_release(parent):
            return parent / "README.md"
        runs, release = parent / "runs", parent / "release"
        if place.is_relative_to(runs) and (release / place.relative_to(runs)).is_dir() and _is_release(release):
            return release / "README.md"
    return None


def hub_page(shown: Shown) -> str | None:
    """The SAE's page on the hub, if it came from there."""
    info = shown.index.info
    repo = re.match(r"[\w.-]+/[\w.-]+", info.sae.where, re.ASCII) if info.sae.kind == "hub" else None
    return None if repo is None else f"https://huggingface.co/{repo[0]}"


def _folder(shown: Shown) -> Path | None:
    """The folder of an SAE that is on this machine."""
    info = shown.index.info
    if info.sae.kind not in ("run", "folder"):
        return None
    return Path(sae_place(shown.index.path, info)).resolve()


def _evaluated(shown: Shown) -> Path | None:
    """The SAE's folder, if there is an evaluation in it."""
    folder = _folder(shown)
    return folder if folder is not None and (folder / EVALUATION).is_file() else None


def _is_release(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _OF_A_RELEASE)
