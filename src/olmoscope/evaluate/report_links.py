"""Links from a report to related pages: other reports, the model card, the page of features.

Addresses are relative to the report, so a folder can be moved or uploaded as a whole. The caller gives only what
exists.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

BROWSE = ("olmoscope index .", "olmoscope browse .")
"""Commands that open the page of features, in a run's folder or an output folder."""


@dataclass(frozen=True)
class Links:
    """Where a report leads.

    Attributes:
        others: text and address of each link under the title.
        own: the address of each SAE's own report, by the SAE's number in this report.
        commands: what to run in the report's folder, in this order, to open the page of features.
    """

    others: Sequence[tuple[str, str]] = ()
    own: Mapping[int, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


NO_LINKS = Links()


def address(target: Path, page: Path) -> str:
    """The address of a file, relative to the page that links to it."""
    return quote(Path(os.path.relpath(target, page.parent)).as_posix())


def links_of_one(page: Path, card: Path | None = None, together: Path | None = None) -> Links:
    """The links of one SAE's report.

    Args:
        page: the report.
        card: the model card of the SAE's release; None if there is none.
        together: the report of all SAEs; None if there is none.
    """
    others = [("All SAEs side by side", together), ("Model card of the release", card)]
    return Links([(text, address(target, page)) for text, target in others if target], commands=_commands(page))


def links_of_several(page: Path, own: Sequence[Path], card: Path | None = None) -> Links:
    """The links of a report of several SAEs.

    Args:
        page: the report.
        own: the report of each SAE, in the order in which this one shows them.
        card: the model card of their release; None if there is none.
    """
    return Links([("Model card of the release", address(card, page))] if card else [],
                 {number: address(path, page) for number, path in enumerate(own, 1)}, _commands(page))


def _commands(page: Path) -> Sequence[str]:
    """Runs and output folders have a recipe, which says where the rows to index are."""
    return BROWSE if (page.parent / "recipe.yaml").is_file() else ()
