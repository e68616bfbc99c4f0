"""Compare a release with its repository on the Hugging Face hub, by checksum.

The hub identifies large files by SHA-256, which the manifest has too, and small ones by git's SHA-1 of a blob ("blob",
the size, a zero byte, the content). So the comparison downloads nothing.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from olmoscope.errors import UserError
from olmoscope.files import read_json, sha256
from olmoscope.hub_errors import hub_exceptions, hub_reason
from olmoscope.hub_reach import asking_hub
from olmoscope.model_errors import first_line
from olmoscope.release.layout import check_root
from olmoscope.release.manifest import MANIFEST, ManifestRead

State = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class HubFile:
    """A file of the release, and whether the repository has the same."""

    name: str
    bytes: int
    state: State


@dataclass(frozen=True)
class Comparison:
    """A release compared with a revision of its repository.

    Attributes:
        commit: the commit of that revision; None if there is no such repository yet, or if it is private and the user
            is not logged in.
        others: files that are only in the repository.
    """

    repo: str
    commit: str | None
    files: list[HubFile]
    others: list[str]

    @property
    def missing(self) -> list[HubFile]:
        """The files that an upload would have to send."""
        return [file for file in self.files if file.state != "same"]


def compare(folder: Path, manifest: ManifestRead, repo: str, revision: str | None = None) -> Comparison:
    """Compare a release's files with those of a repository.

    Args:
        folder: a release whose files match its manifest, which gives the checksums of large files.
        repo: `OWNER/NAME`.
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        UserError: the hub refuses or does not answer, or it has no such revision.
    """
    commit, there = _tree(repo, revision)
    names = [*manifest.files, MANIFEST]
    files = [HubFile(name, (folder / name).stat().st_size, _state(folder, name, manifest, there.get(name)))
             for name in names]
    return Comparison(repo, commit, files, sorted(set(there) - set(names) - {".gitattributes"}))


def repo_and_revision(address: str) -> tuple[str, str | None]:
    """`OWNER/NAME[@REVISION]` as a repository and a revision.

    Raises:
        UserError: the address does not have this form.
    """
    repo, at, revision = address.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or (at and not revision):
        raise UserError(f"{address!r} is not a hub repository: write OWNER/NAME, or OWNER/NAME@REVISION")
    return repo, revision or None


def refuse_damaged(folder: Path, manifest: ManifestRead) -> None:
    """Refuse to upload a release unless every checksum is right.

    Raises:
        UserError: a file is wrong; the message names it.
    """
    for check, passed, figure in check_root(folder, manifest):
        if not passed:
            raise UserError(f"{folder} does not match its manifest: {check}: {figure}; make it again with "
                            f"`olmoscope release {folder.parent}`")


def local_paths(folder: Path) -> list[str]:
    """Local paths that a release would publish: of its language model, and of text files in its recipe."""
    return sorted(set(_paths(read_json(folder / MANIFEST))))


def _paths(tree: object) -> Iterator[str]:
    if isinstance(tree, str) and Path(tree).is_absolute():
        yield tree
    elif isinstance(tree, (dict, list)):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _paths(each)


def refused(error: BaseException, repo: str, doing: str, revision: str | None = None) -> UserError:
    """The hub's error in one line."""
    reason = hub_reason(error, repo, revision=revision, cached=False) or first_line(error)
    return UserError(f"cannot {doing} {repo}: {reason}")


def commit_of(repo: str, revision: str | None, doing: str) -> str:
    """The commit that a revision is now.

    Args:
        revision: a branch, tag or commit; None: the main branch.
        doing: what it is for, for the message.

    Raises:
        UserError: the hub refuses or does not answer, or has no such revision.
    """
    from huggingface_hub import HfApi

    try:
        with asking_hub():
            return str(HfApi().model_info(repo, revision=revision).sha)
    except hub_exceptions() as error:
        raise refused(error, repo, doing, revision) from error


def _tree(repo: str, revision: str | None) -> tuple[str | None, dict[str, Any]]:
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    try:
        with asking_hub():
            commit = HfApi().model_info(repo, revision=revision).sha
            entries = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
            return commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except hub_exceptions() as error:
        if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
            return None, {}
        raise refused(error, repo, "look at hub repository", revision) from error


def _state(folder: Path, name: str, manifest: ManifestRead, there: Any | None) -> State:
    if there is None:
        return "new"
    if there.lfs is not None:
        own = manifest.files[name].sha256 if name in manifest.files else sha256(folder / name)
        return "same" if there.lfs.sha256 == own else "changed"
    content = (folder / name).read_bytes()
    return "same" if there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() else "changed"
