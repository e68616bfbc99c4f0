"""Write any opened SAE, or an index of what its features fire on, in the format of another tool."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from olmoscope.errors import UserError, did_you_mean
from olmoscope.features.delphi import write_delphi, write_explanations
from olmoscope.features.documents import write_documents
from olmoscope.features.label_table import write_labels
from olmoscope.features.neuronpedia import write_neuronpedia
from olmoscope.features.read import FeatureIndex
from olmoscope.files import refuse_file
from olmoscope.labelling.that_count import labels_that_count
from olmoscope.release.transcoder_set import is_index, write_set
from olmoscope.sae.io import dictionary_learning, sparsify
from olmoscope.sae.io.open import open_sae
from olmoscope.sae.io.opened import Opened
from olmoscope.site import Site

WRITERS: Mapping[str, Callable[[Opened, Path], Path]] = {
    "sparsify": sparsify.write, "dictionary-learning": dictionary_learning.write}
"""Writers of one SAE, by the tool's name on the package index."""
CIRCUIT_TRACER = "circuit-tracer"
"""The target for sets of transcoders, and for the indexes of their features."""
SAELENS_READERS = {
    "saebench": "sae_bench.evals.core.main.multiple_evals or run_eval of another evaluation",
    "sae-probes": "sae_probes.run_sae_evals"}
"""Tools that take an SAE loaded by SAELens, and the function that takes it."""


@dataclass(frozen=True)
class Choices:
    """Options of some formats.

    Attributes:
        called: `MODEL/SET`, the names on Neuronpedia.
        window: length of Delphi's windows, in tokens.
    """

    called: str | None = None
    window: int | None = None

    def refuse_unused(self, target: str) -> None:
        """Refuse options of another format.

        Raises:
            UserError: the message names the option.
        """
        if self.called is not None and target != "neuronpedia":
            raise UserError("--called is the name on Neuronpedia: give --to neuronpedia as well")
        if self.window is not None and target != "delphi":
            raise UserError("--window is the length of Delphi's windows: give --to delphi as well")


@dataclass(frozen=True)
class Converted:
    """What was written: the folder that the tool opens, and a note for the user, if there is one."""

    folder: Path
    note: str = ""


def convert(address: str | Path, target: str, folder: Path, site: Site | None = None,
            choices: Choices = Choices()) -> Converted:
    """Write an SAE, ours or another tool's, or an index, in another tool's format.

    Args:
        address: an address for `open_sae`; for the formats of `OF_INDEX`, the folder of an index; for circuit-tracer,
            an address for `convert_set`.
        target: a format of `WRITERS` or `OF_INDEX`, or circuit-tracer.
        folder: the folder to write; files of an earlier export in it are replaced.
        site: the site that the SAE reads, if it does not say.

    Raises:
        UserError: no such target, no such SAE, or one that the tool cannot express.
    """
    choices.refuse_unused(target)
    refuse_unknown(target)
    refuse_file(folder)
    if target in OF_INDEX:
        return OF_INDEX[target](_index_at(Path(address), target), folder, choices)
    if target == CIRCUIT_TRACER:
        return convert_set([str(address)], folder, site)
    if target == "saelens":
        raise UserError("SAELens' format, which SAEBench and sae-probes read too, is written only for Olmoscope runs: "
                        "give their output folder, and leave out --folder")
    if is_index(Path(address)):
        raise UserError(f"{address} is a feature index, which has no weights: give the SAE, or for the index choose "
                        f"--to {', '.join((*OF_INDEX, CIRCUIT_TRACER))}")
    return Converted(WRITERS[target](open_sae(address, site), folder))


def _index_at(path: Path, target: str) -> FeatureIndex:
    """The index in a folder.

    Raises:
        UserError: it holds none; the message says how to get one.
    """
    run = path.parent if path.name == "index" else path
    if not is_index(path) and (run / "done.json").is_file():
        if is_index(run / "index"):
            raise UserError(f"{path} is a run: --to {target} needs its feature index, {run / 'index'}")
        if not (run / "index").exists():
            raise UserError(f"{run} has no feature index, which --to {target} needs; `olmoscope index {run}` makes it")
    if not path.exists():
        raise UserError(f"{path} does not exist: --to {target} needs a feature index, which `olmoscope index` makes of "
                        "an SAE")
    return FeatureIndex(path)


def refuse_unknown(target: str) -> None:
    """Refuse a format that is not written, and a tool without a format of its own; say how to give it an SAE.

    Raises:
        UserError: it is one of these.
    """
    if target in SAELENS_READERS:
        raise UserError(f"--to {target}: it reads SAELens' format, so export without --to and give "
                        f"sae_lens.SAE.load_from_disk(RUN/sae) to {SAELENS_READERS[target]} (docs/interchange.md)")
    known = ("saelens", *WRITERS, CIRCUIT_TRACER, *OF_INDEX)
    if target not in known:
        raise UserError(f"--to {target}: no such format; choose one of {', '.join(known)}"
                        f"{did_you_mean(target, known)}")


def convert_set(addresses: Sequence[str], folder: Path, site: Site | None = None) -> Converted:
    """Write transcoders, one for each layer, as a set for circuit-tracer; or indexes as its feature pages.

    Args:
        addresses: of transcoders, of folders with transcoders, or of indexes.

    Raises:
        UserError: circuit-tracer cannot express one of them; two belong to one layer; or they differ in what all
            transcoders of a set must have in common.
    """
    refuse_file(folder)
    return Converted(folder, write_set(addresses, folder, site))


def _delphi(index: FeatureIndex, folder: Path, choices: Choices) -> Converted:
    cache = write_delphi(index, folder) if choices.window is None else write_delphi(index, folder, choices.window)
    written, kept = write_explanations(index, folder, labels_that_count(index))
    labels = f"; {written:,} labels as explanations" if written else ""
    if kept:
        labels += f"; {kept:,} existing explanations with another text were kept"
    return Converted(cache.folder, f"{cache.firings:,} firings in {cache.windows:,} windows of {cache.length} tokens; "
                     f"{cache.left_out:,} firings left out, at ends of sequences that do not fill a window{labels}")


def _neuronpedia(index: FeatureIndex, folder: Path, choices: Choices) -> Converted:
    made = write_neuronpedia(index, folder, labels_that_count(index), choices.called)
    return Converted(made.folder, f"{made.features:,} features, {made.activations:,} examples, {made.explanations:,} "
                     "labels; fill in creatorName in release.jsonl and sourceset.jsonl")


def _documents(index: FeatureIndex, folder: Path, _: Choices) -> Converted:
    made = write_documents(index, folder)
    return Converted(made.folder, f"{made.documents:,} documents, {made.features:,} features, {made.entries:,} entries")


def _labels(index: FeatureIndex, folder: Path, _: Choices) -> Converted:
    labels = labels_that_count(index)
    return Converted(write_labels(folder, labels).parent, f"{len(labels):,} labels")


OF_INDEX: Mapping[str, Callable[[FeatureIndex, Path, Choices], Converted]] = {
    "delphi": _delphi, "neuronpedia": _neuronpedia, "documents": _documents, "labels": _labels}
"""Writers of an index, by the tool's name."""
