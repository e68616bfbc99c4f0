"""Any opened SAE, or an index of what its features fire on, in the format of another tool."""

from collections.abc import Callable, Mapping
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


def convert(address: str | Path, target: str, folder: Path, site: Site | None = None) -> Path:
    """Write an SAE, ours or anybody's, or an index, in another tool's format.

    Args:
        address: as `open_sae` takes it; for `delphi`, the folder of an index.
        target: of `WRITERS`, or `delphi`.
        folder: to write to; files of an earlier export there are replaced.
        site: what it reads, if it does not say.

    Returns:
        The folder that the tool opens.

    Raises:
        UserError: no such target, no such SAE, or one that the tool cannot express.
    """
    if target == "delphi":
        return write_delphi(FeatureIndex(Path(address)), folder).folder
    if target == "saelens":
        raise UserError("SAELens' format, which SAEBench and sae-probes read too, is written for runs of ours: give "
                        "their output folder, and leave --folder away")
    if target not in WRITERS:
        raise UserError(f"--to {target}: no such format; there are saelens, {', '.join(WRITERS)}, delphi")
    return WRITERS[target](open_sae(address, site), folder)
