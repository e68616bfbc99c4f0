"""Where the stores of an output folder are: in it, or elsewhere, as its `store.json` says.

    OUT/store.json      {"train": "../first/store/train", "held_out": "../first/store/held_out"}

The file exists if `olmoscope train --store` trained on a store of another output folder. Paths are relative to OUT;
null means that there is no such store.
"""

import os
from pathlib import Path

from olmoscope.activations.store.format import read_manifest
from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.recipe.schema import SPLITS

RECORD = "store.json"


def store_folder(out: Path, split: str) -> Path:
    """The folder of the store of a split.

    Raises:
        UserError: it was elsewhere and is gone, or there never was one.
    """
    place = store_places(out).get(split)
    if place is None:
        raise UserError(f"{out} was trained on a store that has no {split} store beside it ({out / RECORD}); to "
                        f"evaluate, run `olmoscope evaluate {out}/runs/RUN --text TEXT`")
    if is_elsewhere(out) and not (place / "manifest.json").exists():
        raise UserError(f"{out} was trained on the store {place}, which is gone; if it is elsewhere now, say where: "
                        f"`olmoscope train {out} --store PATH`")
    return place


def store_places(out: Path) -> dict[str, Path]:
    """The folders in which the stores of an output folder are or would be, by split.

    Raises:
        UserError: the record of where they are is damaged.
    """
    if not is_elsewhere(out):
        return {split: out / "store" / split for split in SPLITS}
    record = read_json(out / RECORD)
    if not isinstance(record, dict) or not isinstance(record.get("train"), str):
        raise UserError(f"{out / RECORD} is damaged; delete it and say where the store is: `olmoscope train {out} "
                        "--store PATH`")
    return {split: Path(os.path.normpath(out.resolve() / path)) for split, path in record.items() if path}


def is_elsewhere(out: Path) -> bool:
    """Whether an output folder was trained on a store that is not in it."""
    return (out / RECORD).is_file()


def find_elsewhere(out: Path, where: Path) -> dict[str, Path]:
    """The stores that `--store` refers to, for an output folder.

    Args:
        where: an output folder, or a training store.

    Raises:
        UserError: there is no training store, or `out` has its own store.
    """
    if (out / "store" / "train" / "manifest.json").exists():
        raise UserError(f"{out} has its own training store; leave out --store, or choose another --out")
    if (where / "manifest.json").exists():
        split = read_manifest(where).split
        if split != "train":
            raise UserError(f"--store {where}: this is the {split} store; give the training store, or the output "
                            "folder that it is in")
        places = {"train": where, "held_out": where.parent / "held_out"}
    else:
        places = store_places(where)
    if not (places["train"] / "manifest.json").exists():
        raise UserError(f"--store {where}: there is no training store; give an output folder of `olmoscope collect`, "
                        "or the store in it (OUT/store/train)")
    return {split: place for split, place in places.items() if (place / "manifest.json").exists()}


def record_elsewhere(out: Path, places: dict[str, Path]) -> None:
    """Record which stores an output folder is trained on."""
    here = out.resolve()
    relative = {split: os.path.relpath(place.resolve(), here) for split, place in places.items()}
    write_json(out / RECORD, {split: relative.get(split) for split in SPLITS})
