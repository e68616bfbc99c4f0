"""Any opened SAE, or an index of what its features fire on, in the format of another tool."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.features.delphi import write_delphi
from olmoscope.features.read import FeatureIndex
from olmoscope.sae.io import dictionary_learning, sparsify
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site

WRITERS: Mapping[str, Callable[[Opened, Path], Path]] = {
    "sparsify": sparsify.write, "dictionary-learning": dictionary_learning.write}
"""By the tool's name on the package index."""


@dataclass(frozen=True)
class Converted:
    """What was written: the folder that the tool opens, and what the user should know of it, if anything."""

    folder: Path
    note: str = ""


def convert(address: str | Path, target: str, folder: Path, site: Site | None = None) -> Converted:
    """Write an SAE, ours or anybody's, or an index, in another tool's format.

    Args:
        address: as `open_sae` takes it; for `delphi`, the folder of an index.
        target: of `WRITERS`, or `delphi`.
        folder: to write to; files of an earlier export there are replaced.
        site: what it reads, if it does not say.

    Raises:
        UserError: no such target, no such SAE, or one that the tool cannot express.
    """
    if target == "delphi":
        cache = write_delphi(FeatureIndex(Path(address)), folder)
        return Converted(cache.folder, f"{cache.firings:,} firings in {cache.windows:,} windows of {cache.length} "
                         f"tokens; left out are {cache.left_out:,} in the ends of sequences, under one window")
    if target == "saelens":
        raise UserError("SAELens' format, which SAEBench and sae-probes read too, is written for runs of ours: give "
                        "their output folder, and leave --folder away")
    if target not in WRITERS:
        raise UserError(f"--to {target}: no such format; there are saelens, {', '.join(WRITERS)}, delphi")
    return Converted(WRITERS[target](open_sae(address, site), folder))
