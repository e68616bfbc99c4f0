"""The formats in which an SAE is opened. To add one: a module like those imported here, and its name in `FORMATS`."""

from typing import Protocol

from olmoscope.sae.io import (
    circuit_tracer,
    clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    reference_trainer,
    run_checkpoint,
    run_folder,
    saelens,
    sparsify,
)
from olmoscope.sae.io.opened import Opened
from olmoscope.sae.io.place import Place
from olmoscope.sae.io.reading import Reading
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
        """A pattern of such files below a folder of many SAEs: each lies in the folder of its SAE, or (a pattern that
        begins with `=`) is one. None: not searched for."""

    def detect(self, place: Place) -> bool:
        """Whether a folder or file is of this format, by what is in it; damaged ones are, so that `read` says why."""

    def look(self, place: Place, site: Site | None = None) -> Reading:
        """How an SAE will be read, from its settings and the headers of its files.

        Args:
            place: what `detect` takes.
            site: what it reads, for an SAE that does not say it.

        Raises:
            UserError: missing or damaged files, an SAE of a kind that is not read, or of another site than `site`.
        """

    def read(self, place: Place, site: Site | None = None) -> Opened:
        """Read an SAE.

        Raises:
            UserError: as `look`; tensors that are damaged, or hold NaN; a site that nothing says.
        """


FORMATS: tuple[Format, ...] = (
    run_folder, run_checkpoint, sparsify, saelens, llamascopium, llama_scope, dictionary_learning, gemma_scope,
    gemma_scope_2, clt, circuit_tracer, openai, hook_z, qwen_scope, goodfire, reference_trainer)
"""In the order in which they are asked."""
