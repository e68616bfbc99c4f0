"""A release's manifest.json: what each SAE is, its figures, where it came from, and the checksum of every file.

    format, version, name, repo_id
    model       name, revision, architecture, d_model, num_layers, layers_path
    sources     for each text source: documents and tokens in training
    saes        id, layer, site, d_sae, activation, matryoshka, k, normalize, canonical, hook names, metrics {held_out,
                training}, run, provenance; for a transcoder also reads, writes, skip
    recipe      the resolved recipe
    files       path -> sha256, bytes; every file of the release except this one

The same runs give the same manifest, byte for byte: its dates are those of training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from olmoscope.errors import UserError
from olmoscope.files import read_json, sha256
from olmoscope.recipe.schema import Activation
from olmoscope.release.export import place_names
from olmoscope.release.finished_run import FinishedRun

MANIFEST = "manifest.json"
FORMAT = "olmoscope release"
VERSION = 1
HELD_OUT: dict[str, Any] = dict.fromkeys(
    ("rows", "zero_rows", "nmse", "fvu", "explained_variance", "cosine", "intervals"), True) | {
    "l0": {"mean"}, "dead": {"share", "window"},
    "language": {"rows", "predictions", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce",
                 "loss_recovered_zero", "loss_recovered_mean", "kl", "intervals"}}
"""The figures of evaluation.json that the manifest repeats."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileRead(_Read):
    """A file of the release."""

    sha256: str
    bytes: int


class SAERead(_Read):
    """What the manifest says of an SAE, as far as validation needs it."""

    id: str
    activation: Activation = "topk"
    """Absent from releases by versions that had only one activation."""
    d_sae: int
    k: int
    normalize: Literal["none", "layer_norm"]
    writes: str | None = None
    """The site that a transcoder writes; None for an SAE."""


class ModelName(_Read):
    """The language model."""

    name: str


class ManifestRead(_Read):
    """A manifest, as far as validation needs it."""

    version: int
    name: str
    repo_id: str
    model: ModelName
    saes: list[SAERead]
    files: dict[str, FileRead]


def read_manifest(folder: Path, called: str | None = None) -> ManifestRead:
    """The manifest of a release.

    Args:
        called: what messages call the release; None: the folder.

    Raises:
        UserError: missing, damaged, not the manifest of a release, or of a newer version.
    """
    path, called = folder / MANIFEST, called or str(folder)
    tree = read_json(path)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{called} is not an Olmoscope release: its {MANIFEST} is another tool's; `olmoscope inspect "
                        f"{called}` shows the SAEs that it has")
    try:
        manifest = ManifestRead.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{called}: {MANIFEST} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; make "
                        "the release again with `olmoscope release OUT`") from error
    if manifest.version > VERSION:
        raise UserError(f"{called} has release format {manifest.version}, this version of olmoscope reads {VERSION}: "
                        "upgrade olmoscope")
    return manifest


def release_manifest(runs: Sequence[FinishedRun], folder: Path) -> dict[str, Any]:
    """The manifest of a release; all its other files must be in `folder`."""
    recipe, store = runs[0].recipe, runs[0].done.store
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": recipe.release.name,
        "repo_id": recipe.release.repo_id,
        "model": store.model.model_dump(),
        "sources": {name: source.model_dump() for name, source in store.sources.items()},
        "saes": [_entry(run) for run in runs],
        "recipe": recipe.model_dump(mode="json"),
        "files": file_sums(folder),
    }


def file_sums(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file of a release except its manifest."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in release_files(folder) if name != MANIFEST}


def release_files(folder: Path) -> list[str]:
    """Every file below `folder`, as a relative path; hidden ones (`.git`, `.cache`) are not part of the release."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _entry(run: FinishedRun) -> dict[str, Any]:
    sae, done, held_out = run.sae, run.done, run.evaluation()
    ends = {} if sae.writes is None else {"reads": str(sae.reads[0]), "writes": str(sae.writes[0]), "skip": sae.skip}
    return {
        "id": sae.id,
        "layer": sae.site.layer_or_none,
        "site": str(sae.site),
        **ends,
        "d_sae": sae.d_sae,
        "activation": sae.activation,
        "matryoshka": sae.matryoshka,
        "k": sae.k,
        "normalize": sae.normalize,
        "canonical": sae.canonical,
        **place_names(run),
        "metrics": {
            "held_out": held_out.model_dump(mode="json", include=HELD_OUT),
            "training": {"nmse": done.nmse, "l0": done.l0, "steps": done.steps, "tokens": done.tokens,
                         "dead": {"share": done.dead_share, "window": done.dead_window}},
        },
        "run": done.run_hash,
        "provenance": done.provenance,
    }
