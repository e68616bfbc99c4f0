"""Open an SAE by its address, in any format of `formats.py`.

Addresses:

    OUT/runs/SAE_ID                       a finished run
    .../checkpoints/step-N.safetensors    a run after N steps; `.../checkpoints` is each checkpoint that it keeps
    FOLDER, FILE                          another tool's SAE; its content decides the format, not its name
    OWNER/NAME:PATH/IN/REPO               a folder or file in a hub repository; `OWNER/NAME` is the whole repository,
                                          `OWNER/NAME@REVISION:PATH` a branch, tag or commit
    saelens:RELEASE/ID                    an entry of SAELens' registry (registry.py)
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from olmoscope.errors import UserError
from olmoscope.sae.coder import SparseCoder
from olmoscope.sae.io import circuit_tracer, run_checkpoint, run_folder
from olmoscope.sae.io.formats import FORMATS, Format
from olmoscope.sae.io.hub import OnHub, on_hub
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Here, Place
from olmoscope.sae.io.reading import Reading
from olmoscope.sae.io.refused import refuse_crosscoder
from olmoscope.sae.io.registry import PREFIX, registered
from olmoscope.sae.io.run_folder import refuse_unfinished
from olmoscope.sae.source import Source
from olmoscope.site import Site

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<path>.*))?")

_FEW = 5
"""Names that a message lists."""


def load(address: str | Path, site: Site | str | int | None = None) -> SparseCoder:
    """Load an SAE, transcoder or crosscoder, from any place and in any format of docs/formats.md.

    Args:
        address: the folder of a finished run; a folder or file that another tool wrote; an address on the hub,
            `OWNER/NAME:PATH/IN/REPO` or `OWNER/NAME@REVISION:PATH`; `saelens:RELEASE/ID` for an entry of SAELens'
            registry; an output folder or a release with a single SAE in it.
        site: the site that it reads, if its files do not say.

    Returns:
        The coder in float32 on the CPU (`.to(device, dtype)` gives it elsewhere). It knows its sites (`reads`,
        `writes`) and its language model (`source.model_name`, `source.model_revision`, `source.bos`).

    Raises:
        UserError: missing, unfinished, damaged, of an unknown format or kind, or of another site than `site`; an
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
        raise UserError(f"{address} holds {len(found)} SAEs; load one of them: {few(found)}")
    opened = open_sae(found[0], None if site is None else Site.parse(site))
    source = Source(opened.name, opened.model_name, opened.model_revision, opened.bos, opened.context_size,
                    opened.identity, opened.metadata)
    return replace(opened.sae, source=source)


def open_sae(where: str | Path, site: Site | None = None) -> Opened:
    """Open an SAE.

    Args:
        where: an address, as at the head of this file.
        site: the site that it reads, if its files do not say.

    Raises:
        UserError: missing, unfinished, damaged, of an unknown format or kind, of an unknown site, or of another site
            than `site`.
    """
    place = place_of(where)
    opened = format_of(place).read(place, site)
    return replace(opened, name=str(where), kind="hub") if isinstance(place, OnHub) else opened


def look_at(where: str | Path, site: Site | None = None) -> tuple[Place, Reading]:
    """How `open_sae` will read an SAE, without loading or downloading its weights.

    Args:
        where, site: as for `open_sae`.

    Raises:
        UserError: as `open_sae`, as far as settings and headers show it.
    """
    place = place_of(where)
    return place, format_of(place).look(place, site)


def place_of(where: str | Path) -> Place:
    """The place of an address.

    Raises:
        UserError: there is nothing at it.
    """
    path, text = Path(where), str(where)
    if path.exists():
        return Here(path)
    if text.startswith(PREFIX):
        entry = registered(text)
        return on_hub(text, entry.repo, None, entry.path, entry)
    if match := _HUB.fullmatch(text):
        return on_hub(text, match["repo"], match["revision"], (match["path"] or "").strip("/"))
    raise UserError(f"{where} does not exist, and is neither an address on the hub (OWNER/NAME:PATH/IN/REPO) nor "
                    f"{PREFIX}RELEASE/ID; give the SAE's folder or file, or one of these addresses")


def find_saes(where: str) -> list[str]:
    """The addresses of all SAEs at a command's argument: the runs of an output folder, the SAEs in a release or any
    other local folder, the checkpoints in a run's `checkpoints`, or the argument itself.

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
    refuse_unfinished(place)
    refuse_crosscoder(place)
    searched = ", ".join(form.SEARCH.lstrip("=") for form in FORMATS if form.SEARCH)
    raise UserError(f"{folder} holds no finished run and no SAE of another format (searched for {searched}); give the "
                    "SAE's own folder or file")


def is_run(where: str) -> bool:
    """Whether there is an Olmoscope run, or a checkpoint of one, at an address."""
    path = Path(where)
    return path.exists() and any(form.detect(Here(path)) for form in (run_folder, run_checkpoint))


def members(place: Place) -> list[str]:
    """The addresses of the SAEs in a folder or repository, by the names of files: those that a circuit-tracer
    config.yaml lists, else the finished runs of an output folder, else those of all other formats."""
    if found := circuit_tracer.listed(place):
        return found
    runs = _search(place, run_folder)
    paths = runs or set().union(*(_search(place, form) for form in FORMATS))
    return [place.at_name(path) for path in sorted(paths, key=_natural)]


def _search(place: Place, form: Format) -> set[str]:
    """The paths in a folder that match a format's `SEARCH`."""
    if form.SEARCH is None:
        return set()
    pattern = form.SEARCH.removeprefix("=")
    found = {name for name in place.names if _matches(name, pattern)}
    return found if form.SEARCH.startswith("=") else {PurePosixPath(name).parent.as_posix() for name in found}


def format_of(place: Place) -> Format:
    """The format of a folder or file.

    Raises:
        UserError: it has none of those that are known.
    """
    for form in FORMATS:
        if form.detect(place):
            return form
    if place.file is None and (within := members(place)):
        if len(within) == 1:
            raise UserError(f"{place.where()} is not an SAE itself, but holds one: give its address, {within[0]}")
        raise UserError(f"{place.where()} holds {len(within)} SAEs; give the address of one of them: {few(within)}")
    refuse_unfinished(place)
    refuse_crosscoder(place)
    raise UserError(f"{place.where()} has an unknown format: it holds {_seen(place)}; give the folder or file of one "
                    f"SAE; known formats are {', '.join(f'{form.NAME} ({form.MARK})' for form in FORMATS)}")


def _seen(place: Place) -> str:
    """The content of a place of unknown format, for a message."""
    if place.file is None:
        return few(place.names) or "nothing"
    header = place.header(place.file)
    return few(sorted(header.shapes)) or f"no tensors ({few(sorted(header.values)) or 'nothing else'})"


def _matches(name: str, pattern: str) -> bool:
    """Whether a path in a folder matches; `**/` matches any number of folders."""
    tail = pattern.rpartition("**/")[2]
    head = pattern.removesuffix(f"**/{tail}") if "**/" in pattern else ""
    return name.startswith(head) and fnmatch(name.removeprefix(head).rpartition("/")[2], tail) and (
        "**/" in pattern or "/" not in name)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
