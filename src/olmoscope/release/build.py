"""Build a release: all finished, evaluated runs of a recipe in one folder, ready to upload.

The release is made in a folder beside its final place, `.release.building`, which is then renamed. So a release is
always complete, and its manifest matches its files. (If it were written file by file, manifest last, new weights would
for a while be under an old manifest.) A killed process leaves the old release, or none if it dies between the two
renames; building again completes it.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.evaluate.report import REPORT, report_of_folders, write_report
from olmoscope.evaluate.report_links import links_of_one, links_of_several
from olmoscope.files import locked, refuse_file, sha256, sync_folder, write_json, write_text
from olmoscope.recipe.kept import differs_from_run, same_run
from olmoscope.recipe.load import find_recipe
from olmoscope.recipe.schema import Recipe
from olmoscope.release.card import CARD, model_card
from olmoscope.release.export import export_run, refuse_unexportable
from olmoscope.release.finished_run import FinishedRun, read_run
from olmoscope.release.layout import SAE_FILES
from olmoscope.release.manifest import MANIFEST, read_manifest, release_manifest
from olmoscope.release.registry import REGISTRY, registry_yaml
from olmoscope.sae.io.saelens_settings import CONFIG
from olmoscope.sae.io.saelens_tensors import WEIGHTS


@dataclass(frozen=True)
class Built:
    """Where the release is, whether it had to be written (false: the same release existed already), and its SAEs."""

    folder: Path
    written: bool
    saes: list[str]


def build_release(out: Path, repo: str | None = None) -> Built:
    """Make `out/release/` from all runs of `out/recipe.yaml`. A second call changes nothing.

    A file of an earlier release that has been changed or damaged since then is replaced.

    Args:
        repo: the hub repository to name in the card and the manifest; None: the recipe's `release.repo_id`.

    Raises:
        UserError: an SAE of the recipe cannot be exported; runs are not finished or not evaluated (all are named); a
            run is of another recipe or damaged; the old release holds files that are not its own; the disk is full;
            another process is building it.
    """
    runs = _runs(out, find_recipe(out)[0])
    if repo is not None:
        runs = [_released_as(run, repo) for run in runs]
    folder, building, old = out / "release", out / ".release.building", out / ".release.old"
    _refuse_foreign_files(folder)
    with locked(building, "building the release"):
        _empty(building)
        common, card = building / REPORT, building / CARD
        for run in runs:
            export_run(run.folder)
            _add(run, building / run.sae.id, card, common if len(runs) > 1 else None)
        write_text(building / REGISTRY, registry_yaml(runs))
        write_report(common, report_of_folders([run.folder for run in runs]), links=links_of_several(
            common, [building / run.sae.id / REPORT for run in runs], card))
        write_text(card, model_card(runs))
        write_json(building / MANIFEST, release_manifest(runs, building))
        written = not _same(building, folder)
        if written:
            (building / ".lock").unlink()
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            building.rename(folder)
            sync_folder(out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(building)
    return Built(folder, written, [run.sae.id for run in runs])


def _runs(out: Path, recipe: Recipe) -> list[FinishedRun]:
    for sae in recipe.saes:
        refuse_unexportable(sae)
    folders = {sae.id: out / "runs" / sae.id for sae in recipe.saes}
    unfinished = [sae_id for sae_id, folder in folders.items() if not (folder / "done.json").is_file()]
    if unfinished:
        raise UserError(f"not trained to the end: {', '.join(unfinished)}; run `olmoscope train {out}` first")
    unmeasured = [sae_id for sae_id, folder in folders.items() if not (folder / "evaluation.json").is_file()]
    if unmeasured:
        raise UserError(f"not evaluated: {', '.join(unmeasured)}; run `olmoscope evaluate {out}` first")
    runs = [read_run(folder) for folder in folders.values()]
    for run, sae in zip(runs, recipe.saes, strict=True):
        if run.sae.id != sae.id or not same_run(run.recipe, recipe, sae.id):
            raise UserError(f"{run.folder} holds a run of another recipe, not of {out / 'recipe.yaml'}"
                            f"{differs_from_run(run.folder, sae.id, recipe)}; move it away and train again")
    return runs


def _released_as(run: FinishedRun, repo: str) -> FinishedRun:
    named = run.recipe.release.model_copy(update={"repo_id": repo})
    return replace(run, recipe=run.recipe.model_copy(update={"release": named}))


def _add(run: FinishedRun, folder: Path, card: Path, common: Path | None) -> None:
    """Put a run's files into its folder of the release.

    Args:
        card: where the model card will be; the run's report links to it.
        common: where the report of all SAEs will be; None if there is only one SAE.
    """
    folder.mkdir(parents=True)
    for name in SAE_FILES:
        source = run.folder / "sae" / name if name in (CONFIG, WEIGHTS) else run.folder / name
        if not source.is_file():
            raise UserError(f"{source} is missing, and the release needs it: train the run again in an empty folder")
        if name == WEIGHTS:
            _link(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)
    write_report(folder / REPORT, report_of_folders([run.folder]),
                 links=links_of_one(folder / REPORT, card, common))


def _link(source: Path, target: Path) -> None:
    """Give the file a second name: weights are gigabytes, and they are only ever replaced, never changed in place."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _same(new: Path, old: Path) -> bool:
    """Whether `old` equals `new`, byte for byte: the manifest has the checksums of all other files."""
    if not (old / MANIFEST).is_file() or (old / MANIFEST).read_bytes() != (new / MANIFEST).read_bytes():
        return False
    return all((old / name).is_file() and ((old / name).samefile(new / name) or sha256(old / name) == file.sha256)
               for name, file in read_manifest(new).files.items())


def _refuse_foreign_files(folder: Path) -> None:
    """Refuse to replace a folder that holds other files, such as `.git`, notes or plots, which would be lost."""
    refuse_file(folder)
    if not folder.exists():
        return
    own = {MANIFEST, *(read_manifest(folder).files if (folder / MANIFEST).is_file() else ())}
    foreign = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    foreign = [name for name in foreign if name not in own]
    if foreign:
        raise UserError(f"{folder} holds files that do not belong to the release ({', '.join(foreign[:3])}"
                        f"{', …' if len(foreign) > 3 else ''}); move them away, since the whole folder is replaced")


def _empty(building: Path) -> None:
    """Remove what a killed process left."""
    for path in building.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
