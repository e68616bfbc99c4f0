"""What `olmoscope inspect` prints: what an SAE is, and with what convention it will be read, on one screen."""

from collections.abc import Iterator, Sequence

from rich.markup import escape

from olmoscope.cli.tables import console, new_table
from olmoscope.sae.io.coverage import Covered
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading
from olmoscope.site import Site
from olmoscope.terminal import say
from olmoscope.units import format_bytes

SHOWN = 12
"""SAEs of a set that are listed."""


def show_reading(place: Place, reading: Reading) -> None:
    """One SAE."""
    shown = new_table(place.where(), "what", "")
    shown.columns[1].justify = "left"
    shown.columns[1].overflow = "fold"
    for name, value in _rows(place, reading):
        shown.add_row(escape(name), escape(value))
    console.print(shown)


def show_set(name: str, saes: Sequence[str]) -> None:
    """A folder of many."""
    say(f"{name} holds {len(saes)} SAEs; look at one of them:")
    for one in saes[:SHOWN]:
        say(f"  olmoscope inspect {one}")
    if len(saes) > SHOWN:
        say("  ...")


def show_coverage(found: Sequence[Covered]) -> None:
    """How much of SAELens' registry can be opened."""
    shown = new_table("SAELens' registry", "SAELens' loader", "read as", "releases", "dictionaries")
    shown.columns[1].justify = "left"
    for one in found:
        shown.add_row(one.loader or "(its own format)", one.format or "not read", f"{one.releases:,}",
                      f"{one.dictionaries:,}")
    console.print(shown)
    all_of_them = sum(one.dictionaries for one in found)
    read = sum(one.dictionaries for one in found if one.format)
    say(f"{read:,} of {all_of_them:,} dictionaries ({read / all_of_them:.2%}) are in a format that is read.")


def _rows(place: Place, reading: Reading) -> Iterator[tuple[str, str]]:
    yield "format", reading.format.partition(" ")[2]
    width = str(reading.d_in) if not reading.transcoder else f"{reading.d_in} to {reading.d_out}"
    yield "dictionary", f"{reading.architecture}, {reading.d_sae:,} latents, width {width}" + (
        f", k {reading.k}" if reading.k is not None else "")
    revision = f" at {reading.model_revision}" if reading.model_revision else ""
    yield "model", f"{reading.model_name}{revision}" if reading.model_name else "not said: give --model"
    if reading.reads != reading.writes:
        yield "reads", _sites(reading.reads)
        yield "writes", _sites(reading.writes)
    else:
        yield "site", _sites(reading.reads)
    for number, line in enumerate(reading.formula()):
        yield "convention" if number == 0 else "", line
    begin = {"yes": "begin with BOS", "no": "without BOS", "auto": "nothing is said of BOS"}[reading.bos]
    yield "sequences", begin if reading.context_size is None else f"of {reading.context_size} tokens, {begin}"
    if reading.unread:
        yield "trained without", reading.unread
    if reading.stated:
        yield "its owner states", ", ".join(f"{name} {value:g}" for name, value in reading.stated.items())
    for name in reading.files:
        yield "file", f"{name}, {format_bytes(place.size(name))}"
    yield "weights", f"{str(reading.dtype).removeprefix('torch.')}, read as float32"
    for note in reading.notes:
        yield "unusual", note


def _sites(sites: tuple[Site, ...]) -> str:
    return ", ".join(map(str, sites)) or "not said: give --site"
