"""The formats in which an SAE is opened. To add one: a module like those imported here, and its name in `FORMATS`."""

from pathlib import Path
from typing import Protocol

from olmoscope.sae.io import reference_trainer, run_checkpoint, run_folder, saelens
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site


class Format(Protocol):
    """A module that knows one format. Where we write the format too, it has a `write(sae, path, metadata) -> bool`."""

    @property
    def NAME(self) -> str:
        """What people call it, with its article."""

    @property
    def MARK(self) -> str:
        """What `detect` looks for, in words: a file's name, if it can be one."""

    @property
    def SEARCH(self) -> str | None:
        """A pattern of such files below a folder of many SAEs; each lies in the folder of its SAE. None: not searched
        for."""

    @property
    def HUB_FILES(self) -> tuple[str, ...]:
        """The files of such a folder on the hub, the first of which tells the format; none: not fetched from there."""

    def detect(self, path: Path) -> bool:
        """Whether a folder or file is of this format, by what is in it; damaged ones are, so that `read` says why."""

    def read(self, path: Path, site: Site | None = None) -> Opened:
        """Read an SAE.

        Args:
            path: what `detect` takes.
            site: what it reads, for an SAE that does not say it.

        Raises:
            UserError: missing or damaged files, an SAE of a kind that is not read, or of another site than `site`.
        """


FORMATS: tuple[Format, ...] = (run_folder, run_checkpoint, saelens, reference_trainer)
"""In the order in which they are asked."""
