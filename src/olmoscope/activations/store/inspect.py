"""What a store on disk is and how complete it is, whatever its state: nothing here needs it to be finished."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from olmoscope.activations.store.format import Manifest, has_segment, read_manifest
from olmoscope.activations.store.growth import parts_of
from olmoscope.activations.store.place import store_places
from olmoscope.errors import UserError
from olmoscope.files import is_locked, read_json
from olmoscope.recipe.schema import SPLITS
from olmoscope.tokens.segments import has_token_segment, segment_name

PART = rf"({'|'.join(SPLITS)})(-\d+)?"
"""The name of a part's folder."""


@dataclass(frozen=True)
class StoreInfo:
    """The state of a store, finished or not."""

    store: Path
    manifest: Manifest | None
    """None while its tokens are being packed; collection writes it."""
    live: bool
    """Whether a process is writing it now."""
    token_segments: int
    packed: bool
    """Whether all tokens are packed; only then is the number of segments known."""
    segments: int
    """How many segments the store will have; while that is unknown, how many are packed so far."""
    missing: list[int]
    """Segments without activations."""
    bytes: dict[str, int]
    """Bytes on disk now, by folder: `tokens`, `rows`, `layer_07`."""


def find_stores(path: Path) -> list[Path]:
    """The stores at a path: the path itself, or those of both splits of an output folder, wherever they are; with all
    their parts.

    Raises:
        UserError: there is none.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    for stores in ([path], [path / split for split in SPLITS], list(store_places(path).values())):
        if found := [store for store in stores if _looks_like_a_store(store)]:
            return [part for store in found for part in parts_of(store)]
    raise UserError(f"{path} holds no activation store: give an output folder of `olmoscope collect`, or one store in "
                    "it (OUT/store/train)")


def output_folder(store: Path) -> Path | None:
    """The output folder that a store belongs to, or None if it belongs to none."""
    out = store.absolute().parent.parent
    return out if store.absolute().parent.name == "store" and re.fullmatch(PART, store.name) else None


def describe(store: Path) -> StoreInfo:
    """What is in a store, from names and sizes, not contents.

    Raises:
        UserError: its manifest or its token index is damaged or in a newer format.
    """
    manifest = read_manifest(store) if (store / "manifest.json").exists() else None
    index = store / "tokens" / "index.json"
    packed = index.exists()
    token_segments = [number for number in segment_numbers(store / "tokens") if has_token_segment(store, number)]
    segments = len(read_json(index)["rows"]) if packed else manifest.segments if manifest else len(token_segments)
    folders = ["tokens", "rows", *(site.folder for site in (manifest.sites if manifest else []))]
    sizes = {folder: sum(path.stat().st_size for path in (store / folder).glob("segment-*.safetensors"))
             for folder in folders}
    return StoreInfo(store, manifest, is_locked(store), len(token_segments), packed, segments,
                     [number for number in range(segments) if not has_segment(store, number)], sizes)


def segment_numbers(folder: Path, pattern: str = segment_name(0).replace("000000", r"(\d{6,})")) -> Iterator[int]:
    """The numbers in the names of a folder's files, ascending.

    Args:
        pattern: matches the whole name, with one group for the number.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if match := re.fullmatch(pattern, name):
            yield int(match[1])


def finished_segments(store: Path) -> set[int]:
    """The segments for which `has_segment` is true, from one listing of a folder."""
    return set(segment_numbers(store / "checksums", r"segment-(\d{6,})\.json"))


def _looks_like_a_store(path: Path) -> bool:
    return (path / "tokens").is_dir() or ((path / "manifest.json").is_file() and (path / "checksums").is_dir())
