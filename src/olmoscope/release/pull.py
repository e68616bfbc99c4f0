"""Download a release from the Hugging Face hub, and check it.

huggingface_hub transfers the files. A pull that ends early, by an error or by Ctrl-C, leaves only what the next one
does not fetch again: files that are whole, and the library's notes on them in `.cache/huggingface`. The manifest comes
last.
"""

import contextlib
import glob
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.files import make_folder, nearest_folder, refuse_file, remove
from olmoscope.hub_errors import hub_exceptions
from olmoscope.hub_reach import asking_hub
from olmoscope.release.layout import differing_files
from olmoscope.release.manifest import MANIFEST, ManifestRead, read_manifest
from olmoscope.release.on_hub import commit_of, refused

_DOING = "get a release from hub repository"


def pull(repo: str, folder: Path, *, revision: str | None = None, only: list[str] | None = None) -> ManifestRead:
    """Download an Olmoscope release and check every file against the manifest. A second call gets only what is missing.

    Args:
        repo: `OWNER/NAME`.
        folder: where to put it.
        revision: a branch, tag or commit; None: the main branch.
        only: ids of the SAEs wanted; None: all.

    Raises:
        UserError: it is not an Olmoscope release, it has no such SAE, a file is damaged, `folder` is a file, or the hub
            refuses or does not answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    refuse_file(folder)
    commit = commit_of(repo, revision, _DOING)
    manifest = _manifest_of(repo, commit, revision)
    unknown = set(only or ()) - {sae.id for sae in manifest.saes}
    if unknown:
        raise UserError(f"{repo} has no SAE {', '.join(sorted(unknown))}; it has "
                        f"{', '.join(sae.id for sae in manifest.saes)}")
    wanted = [name for name in manifest.files
              if not only or "/" not in name or name.rpartition("/")[0] in only]
    with _keeping_what_arrived(folder, manifest, wanted) as there_before:
        make_folder(folder)
        try:
            with asking_hub():
                snapshot_download(repo, revision=commit, local_dir=folder,
                                  allow_patterns=[glob.escape(name) for name in wanted])
            _refuse_differing(repo, folder, manifest, wanted, there_before)
            with asking_hub():
                hf_hub_download(repo, MANIFEST, revision=commit, local_dir=folder)
        except hub_exceptions() as error:
            raise refused(error, repo, _DOING, revision) from error
    return manifest


def _manifest_of(repo: str, commit: str, revision: str | None) -> ManifestRead:
    """The manifest at a commit; nothing is kept.

    Raises:
        UserError: there is none, or it is not one of a release that this version reads.
    """
    from huggingface_hub import errors, hf_hub_download

    with tempfile.TemporaryDirectory() as folder:
        try:
            with asking_hub():
                hf_hub_download(repo, MANIFEST, revision=commit, local_dir=folder)
        except hub_exceptions() as error:
            if isinstance(error, errors.EntryNotFoundError) and isinstance(error, errors.HfHubHTTPError):
                raise UserError(f"{repo} is not an Olmoscope release: it has no {MANIFEST}; `olmoscope inspect {repo}` "
                                "shows the SAEs that it has") from error
            raise refused(error, repo, _DOING, revision) from error
        return read_manifest(Path(folder), called=repo)


def _refuse_differing(repo: str, folder: Path, manifest: ManifestRead, wanted: Iterable[str],
                      there_before: set[Path]) -> None:
    """Refuse files that are absent or differ from the manifest.

    Args:
        there_before: files that the pull may have left as they were.

    Raises:
        UserError: it names them.
    """
    wrong = differing_files(folder, manifest, wanted)
    if old := [name for name in wrong if folder / name in there_before]:
        raise UserError(f"{folder} does not match the manifest of {repo}: {', '.join(old)} differ; delete them and "
                        "pull again")
    if wrong:
        raise UserError(f"{repo} does not match its own manifest: {', '.join(wrong)} differ or are missing there; an "
                        f"upload may be incomplete: pull a tag, `olmoscope pull {repo}@TAG`, or ask its owner")


@contextlib.contextmanager
def _keeping_what_arrived(folder: Path, manifest: ManifestRead, wanted: Iterable[str]) -> Iterator[set[Path]]:
    """Run a block that downloads; if it ends early, remove what it wrote, except what need not be fetched again.

    Yields:
        All that was in the folder before.

    Raises:
        UserError: that of the block, with a word on what was kept.
    """
    before, above = set(_below(folder)), nearest_folder(folder)
    finished, kept = False, 0
    try:
        try:
            yield before
            finished = True
        finally:
            if not finished:
                kept = _tidied(folder, manifest, wanted, before, above)
    except UserError as error:
        if kept:
            raise UserError(f"{error}; the files that have arrived whole ({kept}) stay in {folder}, and are not "
                            "fetched again") from error
        raise


def _tidied(folder: Path, manifest: ManifestRead, wanted: Iterable[str], before: set[Path], above: Path) -> int:
    """Remove what a pull that ended early left.

    Args:
        before: what was in the folder before.
        above: the nearest folder that existed before.

    Returns:
        The number of files that stay because they are whole.
    """
    new = [name for name in wanted if (folder / name).is_file() and folder / name not in before]
    wrong = differing_files(folder, manifest, new)
    for name in wrong:
        remove(folder / name)
    # huggingface_hub before version 2 continues a file that is not whole.
    if len(new) == len(wrong) and not any(path.suffix == ".incomplete" for path in _below(folder)):
        for path in sorted(set(_below(folder)) - before, reverse=True):  # the content of a folder before the folder
            path.rmdir() if path.is_dir() else path.unlink()
        made = folder.absolute()
        while made != above and made.is_dir():
            made.rmdir()
            made = made.parent
    return len(new) - len(wrong)


def _below(folder: Path) -> list[Path]:
    """All files and folders below a folder."""
    return list(folder.rglob("*")) if folder.is_dir() else []
