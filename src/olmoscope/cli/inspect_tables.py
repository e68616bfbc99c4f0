"""The output of `olmoscope inspect`: what an SAE is and how it will be read, on one screen."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from olmoscope.cli.tables import console, new_table, show_facts
from olmoscope.errors import UserError
from olmoscope.sae.io.coverage import Covered
from olmoscope.sae.io.open import look_at
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading
from olmoscope.site import Site
from olmoscope.terminal import say
from olmoscope.units import format_bytes

SHOWN = 12
"""Number of SAEs of a set that are listed."""

_BOS = {"yes": "with BOS", "no": "without BOS", "auto": "BOS not stated"}


def show_reading(place: Place, reading: Reading) -> None:
    """Print one SAE."""
    show_facts(place.where(), _rows(place, reading))


def show_set(name: str, saes: Sequence[str], site: Site | None = None) -> None:
    """Print the addresses of the SAEs in a folder, repository or release, and for files on this machine also what they
    have in common and how they differ."""
    say(f"{name} holds {len(saes):,} SAEs. Inspect one of them:")
    for one in saes[:SHOWN]:
        say(f"  olmoscope inspect {one}")
    if len(saes) > SHOWN:
        say(f"  ... and {len(saes) - SHOWN:,} more")
    if not all(Path(one).exists() for one in saes):
        return
    readings, refused = list[Reading](), list[str]()
    for one in saes:
        try:
            readings.append(look_at(one, site)[1])
        except UserError as error:
            refused.append(str(error))
    if readings:
        show_facts("all of them" if not refused else "those that can be read", _common(readings))
    for reason in refused[:SHOWN]:
        say(f"cannot be read: {reason}")
    if len(refused) > SHOWN:
        say(f"... and {len(refused) - SHOWN:,} more cannot be read")


def show_coverage(found: Sequence[Covered]) -> None:
    """Print how much of SAELens' registry can be opened."""
    shown = new_table("SAELens' registry", "SAELens' loader", "format here", "releases", "dictionaries")
    shown.columns[1].justify = "left"
    for one in found:
        shown.add_row(one.loader or "(SAELens' own)", one.format or "cannot be read", f"{one.releases:,}",
                      f"{one.dictionaries:,}")
    console.print(shown)
    total = sum(one.dictionaries for one in found)
    read = sum(one.dictionaries for one in found if one.format)
    say(f"Olmoscope reads the format of {read:,} of {total:,} dictionaries ({read / total:.2%}).")


def _common(readings: Sequence[Reading]) -> Iterator[tuple[str, str]]:
    """Each fact, with all its values in a set."""
    facts: tuple[tuple[str, Callable[[Reading], str]], ...] = (
        ("format", lambda one: one.format.partition(" ")[2]), ("kind", lambda one: one.architecture),
        ("latents", lambda one: f"{one.d_sae:,}"), ("width", lambda one: f"{one.d_in:,}"),
        ("model", lambda one: one.model_name or "not stated (give --model)"), ("reads", lambda one: _sites(one.reads)))
    for name, value in facts:
        values = list(dict.fromkeys(map(value, readings)))
        more = f", and {len(values) - SHOWN:,} more" if len(values) > SHOWN else ""
        yield name, "; ".join(values[:SHOWN]) + more


def _rows(place: Place, reading: Reading) -> Iterator[tuple[str, str]]:
    yield "format", reading.format.partition(" ")[2]
    width = f"{reading.d_in:,} to {reading.d_out:,}" if reading.d_in != reading.d_out else f"{reading.d_in:,}"
    k = "" if reading.k is None else f", k {reading.k:,}"
    yield "dictionary", f"{reading.architecture}{k}, {reading.d_sae:,} latents, width {width}"
    revision = f" at {reading.model_revision}" if reading.model_revision else ""
    yield "model", f"{reading.model_name}{revision}" if reading.model_name else "not stated (give --model)"
    if reading.reads != reading.writes:
        yield "reads", _sites(reading.reads)
        yield "writes", _sites(reading.writes)
    else:
        yield "site", _sites(reading.reads)
    yield from _listed("computes", reading.formula())
    length = "" if reading.context_size is None else f"{reading.context_size:,} tokens, "
    yield "sequences", f"{length}{_BOS[reading.bos]}"
    if reading.unread:
        yield "left out", f"{reading.unread}, in training"
    if reading.stated:
        yield "published", ", ".join(f"{name} {value:g}" for name, value in reading.stated.items())
    yield "weights", str(reading.dtype).removeprefix("torch.")
    yield from _listed("files", [f"{name}, {format_bytes(place.size(name))}" for name in reading.files])
    yield from _listed("notes", reading.notes)


def _listed(name: str, values: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Rows with one common name, which only the first row shows."""
    for number, value in enumerate(values):
        yield "" if number else name, value


def _sites(sites: tuple[Site, ...]) -> str:
    return ", ".join(map(str, sites)) or "not stated (give --site)"
