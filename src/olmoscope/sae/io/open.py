"""Open an SAE, wherever it is and whatever format of `formats.py` it has.

What names an SAE:

    OUT/runs/SAE_ID                a finished run
    .../checkpoints/step-N.safetensors    as it was after N steps; `.../checkpoints`: at each checkpoint that it keeps
    FOLDER                         cfg.json and sae_weights.safetensors
    FILE                           a torch checkpoint of the reference trainer
    OWNER/NAME:PATH/IN/REPO        a folder of a hub repository; `OWNER/NAME` where it is the repository itself,
                                   `OWNER/NAME@REVISION:PATH` for a branch, tag or commit
"""

import re
from dataclasses import replace
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.sae.io import run_checkpoint
from olmoscope.sae.io.formats import FORMATS, Format
from olmoscope.sae.io.hub import fetch
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<path>.*))?")


def open_sae(where: str | Path, site: Site | None = None) -> Opened:
    """Open an SAE.

    Args:
        where: see the head of this file.
        site: what it reads, for an SAE that does not say it.

    Raises:
        UserError: nothing there, unfinished, damaged, of a kind that is not read, not of the residual stream, or of
            another site than `site`.
    """
    path = Path(where)
    if path.exists():
        return format_of(path).read(path, site)
    if match := _HUB.fullmatch(str(where)):
        folder = fetch(match["repo"], match["path"] or "", match["revision"],
                       [form.HUB_FILES for form in FORMATS if form.HUB_FILES])
        return replace(format_of(folder).read(folder, site), name=str(where), kind="hub")
    raise UserError(f"{where} is no folder or file, and no hub id (OWNER/NAME:PATH/IN/REPO)")


def find_saes(where: str) -> list[str]:
    """What a command's argument stands for: the runs of an output folder, the SAEs of a release, the checkpoints in a
    run's `checkpoints`, or the one named.

    Raises:
        UserError: an output folder or release without SAEs.
    """
    folder = Path(where)
    if not folder.is_dir() or any(form.detect(folder) for form in FORMATS):
        return [where]
    if kept := sorted(filter(run_checkpoint.detect, folder.iterdir())):
        return [str(path) for path in kept]
    searched = [(form.NAME, form.SEARCH) for form in FORMATS if form.SEARCH]
    for _, pattern in searched:
        if found := sorted({path.parent for path in folder.glob(pattern)}):
            return [str(path) for path in found]
    kinds = " and no ".join(f"{name.partition(' ')[2]} ({pattern})" for name, pattern in searched)
    raise UserError(f"{folder} holds no {kinds}")


def format_of(path: Path) -> Format:
    """Which format a folder or file has.

    Raises:
        UserError: none that is known.
    """
    for form in FORMATS:
        if form.detect(path):
            return form
    raise UserError(f"{path} is neither {' nor '.join(f'{form.NAME} ({form.MARK})' for form in FORMATS)}")
