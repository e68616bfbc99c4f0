"""Export: the SAE folder of a finished run, `RUN/sae/`, in SAELens' format, from its final checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.recipe.schema import CoderConfig, Recipe
from olmoscope.recipe.sources import ChatSource, DolmaSource, HubSource, Source, TableSource
from olmoscope.release.finished_run import FinishedRun, read_run
from olmoscope.sae.io import saelens
from olmoscope.sae.io.saelens_places import hook_names
from olmoscope.site import Site, SiteModule


@dataclass(frozen=True)
class Exported:
    """Where an SAE is, and whether it had to be written (false: the same values existed already)."""

    folder: Path
    written: bool


def export_run(run: Path) -> Exported:
    """Write `run/sae/` from the final checkpoint of a finished run. Doing it again changes nothing.

    Raises:
        UserError: SAELens cannot compute the SAE; the run is unfinished or mixed up; the checkpoint is missing or
            damaged; weights are not finite; the disk is full.
    """
    finished = read_run(run)
    refuse_unexportable(finished.sae)
    return Exported(run / "sae", saelens.write(finished.load(), run / "sae", saelens_metadata(finished)))


def refuse_unexportable(sae: CoderConfig) -> None:
    """Refuse an SAE that SAELens cannot compute.

    Raises:
        UserError: SAELens has no architecture for this SAE.
    """
    if sae.activation == "groupmax":
        raise UserError(f"{sae.id} cannot be exported: SAELens has no architecture that takes the maximum of groups; "
                        "evaluate it as it is, or train it with another activation")
    if len(sae.reads) > 1:
        raise UserError(f"{sae.id} cannot be exported: SAELens has no crosscoders, which read several sites; evaluate "
                        "it as it is, or train an SAE of one site")
    if sae.skip and sae.activation == "topk":
        raise UserError(f"{sae.id} cannot be exported: SAELens has no TopK transcoder with a skip; evaluate it as it "
                        "is, or train it with activation: batchtopk or jumprelu, or without skip")


def place_names(run: FinishedRun) -> dict[str, Any]:
    """The place that an SAE reads, and the one that a transcoder writes, under SAELens' keys.

    Raises:
        UserError: the run does not say which module of the model this is.
    """
    layers_path = run.done.store.model.layers_path
    names: dict[str, Any] = {}
    for site, out in ((run.sae.reads[0], False), *((site, True) for site in run.sae.writes or [])):
        names |= hook_names(layers_path, site, module_of(run, site), out=out)
    return names


def module_of(run: FinishedRun, site: Site) -> SiteModule:
    """The module of the model where a site of a run is.

    Raises:
        UserError: the run does not say.
    """
    module = run.done.store.module(site)
    if module is None:
        raise UserError(f"{run.sae.id} cannot be exported: {run.folder} was made by a version that did not record the "
                        f"module of the model where {site} is; collect and train it again")
    return module


def saelens_metadata(run: FinishedRun) -> dict[str, Any]:
    """The metadata for SAELens' users: which activations an SAE reads, and what it was trained on."""
    done, model = run.done, run.done.store.model
    tied, nested = "tied_" if run.sae.weights == "tied" else "", "matryoshka_" if run.sae.matryoshka else ""
    kind = "" if run.sae.writes is None else "_skip_transcoder" if run.sae.skip else "_transcoder"
    return {
        "training_architecture": f"{tied}{nested}{run.sae.activation}{kind}",
        "model_name": model.name,
        "model_revision": model.revision,
        **place_names(run),
        "context_size": max(high for _, high in run.recipe.tokens.chunk_lengths),
        "prepend_bos": run.recipe.tokens.bos == "yes",
        "dataset_path": ", ".join(dataset_names(run.recipe)),
        "training_tokens": done.tokens,
        "l0": done.l0,
        "num_dead_features": None if done.dead_share is None else round(done.dead_share * run.sae.d_sae),
        "dead_window": done.dead_window,
        "olmoscope_version": done.provenance.get("olmoscope"),
        "olmoscope_run": done.run_hash,
    }


def dataset_names(recipe: Recipe) -> list[str]:
    """The public name of each text source: the hub repository if it has one, else the name in the recipe.

    Local paths are left out: they mean nothing elsewhere.
    """
    return [dataset_repo(source) or source.name for source in recipe.text.sources]


def dataset_repo(source: Source) -> str | None:
    """The hub dataset that a source reads, or None."""
    if isinstance(source, HubSource | ChatSource | TableSource):
        return source.repo
    if isinstance(source, DolmaSource) and source.url_list and source.url_list.startswith("hf://datasets/"):
        return "/".join(source.url_list.removeprefix("hf://datasets/").split("/")[:2])
    return None
