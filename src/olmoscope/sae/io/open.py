"""Open an SAE, wherever it is and whatever format of `formats.py` it has.

What names an SAE, its address:

    OUT/runs/SAE_ID                a finished run
    .../checkpoints/step-N.safetensors    as it was after N steps; `.../checkpoints`: at each checkpoint that it keeps
    FOLDER, FILE                   anybody's, whatever its name: what is in it tells its format
    OWNER/NAME:PATH/IN/REPO        such a folder or file of a hub repository; `OWNER/NAME` where it is the repository
                                   itself, `OWNER/NAME@REVISION:PATH` for a branch, tag or commit
    saelens:RELEASE/ID             an entry of SAELens' registry (registry.py)
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from olmoscope.errors import UserError
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import circuit_tracer, run_checkpoint
from olmoscope.sae.io.formats import FORMATS, Format
from olmoscope.sae.io.hub import OnHub, on_hub
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading
from olmoscope.sae.io.registry import PREFIX, registered
from olmoscope.sae.source import Source
from olmoscope.site import Site

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<path>.*))?")

_FEW = 5
"""SAEs of a set that a message names."""


def load(address: str | Path, site: Site | str | int | None = None) -> SparseCoder:
    """Load an SAE, transcoder or crosscoder, wherever it is and whoever trained it.

    Args:
        address: the folder of a finished run; anybody's folder or file in one of the formats of docs/formats.md; an
            address on the hub, `OWNER/NAME:PATH/IN/REPO` or `OWNER/NAME@REVISION:PATH`; `saelens:RELEASE/ID` for an
            entry of SAELens' registry; an output folder or a release with a single SAE in it.
        site: what it reads, for one whose files do not say it.

    Returns:
        The coder in float32 on the CPU (`.to(device, dtype)` gives it elsewhere). It knows its sites (`reads`,
        `writes`) and its language model (`source.model_name`, `source.model_revision`, `source.bos`).

    Raises:
        UserError: nothing there, unfinished, damaged, of a kind that is not read, or of another site than `site`; an
            output folder with several SAEs.

    Example:
        >>> import olmoscope
        >>> sae = olmoscope.load("olmoscope-demo/runs/layer_07/width_4096/topk_32_raw_untied")
        >>> sae
        TopK(width 256, 4096 latents, normalize none)
        >>> str(sae.reads[0]), sae.source.model_name
        ('layers.7', 'tiny')
    """
    found = find_saes(str(address))
    if len(found) > 1:
        raise UserError(f"{address} holds {len(found)} SAEs; load one of them: {', '.join(found)}")
    opened = open_sae(found[0], None if site is None else Site.parse(site))
    source = Source(opened.name, opened.model_name, opened.model_revision, opened.bos, opened.context_size,
                    opened.identity, opened.metadata)
    return replace(opened.sae, source=source)


def open_sae(where: str | Path, site: Site | None = None) -> Opened:
    """Open an SAE.

    Args:
        where: see the head of this file.
        site: what it reads, for an SAE that does not say it.

    Raises:
        UserError: nothing there, unfinished, damaged, of a kind that is not read, of a site that is not known, or of
            another site than `site`.
    """
    place = place_of(where)
    opened = format_of(place).read(place, site)
    return replace(opened, name=str(where), kind="hub") if isinstance(place, OnHub) else opened


def look_at(where: str | Path, site: Site | None = None) -> tuple[Place, Reading]:
    """How `open_sae` will read an SAE: nothing large is loaded, or downloaded.

    Args:
        where, site: as `open_sae` takes them.

    Raises:
        UserError: as `open_sae`, as far as it can be seen from settings and headers.
    """
    place = place_of(where)
    return place, format_of(place).look(place, site)


def place_of(where: str | Path) -> Place:
    """Where the files of an address are.

    Raises:
        UserError: nothing there.
    """
    path, text = Path(where), str(where)
    if path.exists():
        return Here(path)
    if text.startswith(PREFIX):
        entry = registered(text)
        return on_hub(text, entry.repo, None, entry.path, entry)
    if match := _HUB.fullmatch(text):
        return on_hub(text, match["repo"], match["revision"], (match["path"] or "").strip("/"))
    raise UserError(f"{where} is no folder or file, no hub id (OWNER/NAME:PATH/IN/REPO), and no {PREFIX}RELEASE/ID")


def find_saes(where: str) -> list[str]:
    """What a command's argument stands for: the runs of an output folder, the SAEs of a release or of any other folder
    on this machine, the checkpoints in a run's `checkpoints`, or the one named.

    Raises:
        UserError: a folder without SAEs.
    """
    folder = Path(where)
    place = Here(folder)
    if not folder.is_dir() or any(form.detect(place) for form in FORMATS):
        return [where]
    if kept := sorted(path for path in folder.iterdir() if run_checkpoint.detect(Here(path))):
        return [str(path) for path in kept]
    if found := members(place):
        return found
    kinds = " and no ".join(dict.fromkeys(f"{form.NAME.partition(' ')[2]} ({form.SEARCH.lstrip('=')})"
                                          for form in FORMATS if form.SEARCH))
    raise UserError(f"{folder} holds no {kinds}")


def members(place: Place) -> list[str]:
    """The addresses of the SAEs of a set: those that a circuit-tracer config.yaml lists, else the files and folders
    below that the first format of which there are any is searched by. Whether they are any is not looked at."""
    if found := circuit_tracer.listed(place):
        return found
    for form in FORMATS:
        if form.SEARCH is None:
            continue
        pattern, is_file = form.SEARCH.removeprefix("="), form.SEARCH.startswith("=")
        found = [name for name in place.names if _matches(name, pattern)]
        if found:
            paths = {name if is_file else PurePosixPath(name).parent.as_posix() for name in found}
            return [place.at_name(path) for path in sorted(paths, key=_natural)]
    return []


def format_of(place: Place) -> Format:
    """Which format a folder or file has.

    Raises:
        UserError: none that is known.
    """
    for form in FORMATS:
        if form.detect(place):
            return form
    if place.file is None and (within := members(place)):
        raise UserError(f"{place.where()} is no SAE itself, but a set of {len(within)}; name one of them: "
                        f"{_few(within)}")
    raise UserError(f"{place.where()} is of no format that is known: it holds {_seen(place)}; known are "
                    f"{', '.join(f'{form.NAME} ({form.MARK})' for form in FORMATS)}")


def _seen(place: Place) -> str:
    """What there is, for the message that it is of no format."""
    if place.file is None:
        return _few(place.names) or "nothing"
    header = place.header(place.file)
    return _few(sorted(header.shapes)) or f"no tensors ({_few(sorted(header.values)) or 'nothing else'})"


def _matches(name: str, pattern: str) -> bool:
    """Whether a path in a folder matches; `**/` stands for any folders, or none."""
    tail = pattern.rpartition("**/")[2]
    head = pattern.removesuffix(f"**/{tail}") if "**/" in pattern else ""
    return name.startswith(head) and fnmatch(name.removeprefix(head).rpartition("/")[2], tail) and (
        "**/" in pattern or "/" not in name)


def _natural(name: str) -> list[tuple[int, str]]:
    """So that layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
