"""The formats that are read. To add one, write a module like those imported here and add it to `FORMATS`."""

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
    """The module of one format. If Olmoscope writes the format too, it has `write(sae, path, metadata) -> bool`."""

    @property
    def NAME(self) -> str:
        """The format's name with its article, for messages."""

    @property
    def MARK(self) -> str:
        """What `detect` looks for, in words: a file's name if possible."""

    @property
    def SEARCH(self) -> str | None:
        """A pattern of files in a folder of many SAEs: each such file is in the folder of an SAE or, if the pattern
        begins with `=`, is an SAE itself. None for a format without a typical name."""

    def detect(self, place: Place) -> bool:
        """Whether a folder or file has this format, by its content, even if damaged: `read` says why."""

    def look(self, place: Place, site: Site | None = None) -> Reading:
        """How an SAE will be read, from its settings and the headers of its files.

        Args:
            place: one that `detect` accepts.
            site: the site that it reads, if its files do not say.

        Raises:
            UserError: missing or damaged files, a kind of SAE that is not supported, or another site than `site`.
        """

    def read(self, place: Place, site: Site | None = None) -> Opened:
        """Read an SAE.

        Raises:
            UserError: as `look`; damaged tensors or NaN; an unknown site.
        """


FORMATS: tuple[Format, ...] = (
    run_folder, run_checkpoint, sparsify, saelens, llamascopium, llama_scope, dictionary_learning, gemma_scope,
    gemma_scope_2, clt, circuit_tracer, openai, hook_z, qwen_scope, goodfire, reference_trainer)
"""In the order in which `detect` is called."""
