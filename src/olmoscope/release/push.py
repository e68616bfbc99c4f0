"""Upload a release to the Hugging Face hub.

huggingface_hub transfers the files, and does not send again what arrived before a lost connection or a kill. An upload
may take several commits, and between them the main branch is not a complete release. So the last step sets a tag, on a
commit whose files have all been compared with ours: the tag always gives the complete release.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.hub_errors import hub_exceptions
from olmoscope.release.manifest import MANIFEST, read_manifest
from olmoscope.release.on_hub import Comparison, compare, refuse_damaged, refused

_NOT_IN_TAGS = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|^@$|(^|/)\.|\.lock(/|$)")
"""What git refuses in the name of a tag."""


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now.

    Attributes:
        uploaded: number of files sent; 0 if all were there already.
        files: number of files of the release.
    """

    repo: str
    commit: str
    tag: str
    uploaded: int
    files: int


def default_tag(folder: Path) -> str:
    """A name that identifies the release: from the manifest's checksum, and so from all files."""
    return f"release-{sha256(folder / MANIFEST)[:12]}"


def checked_tag(tag: str) -> str:
    """A tag that git accepts as one: its rules are those of `git check-ref-format`.

    Raises:
        UserError: git does not accept it. The hub would say so only after the upload.
    """
    if not tag or tag.startswith(("-", "/")) or tag.endswith(("/", ".")) or _NOT_IN_TAGS.search(tag):
        raise UserError(f"--tag {tag!r} is not a name for a tag: use letters, digits, dots, - and _, for example v1.0")
    return tag


def push(folder: Path, repo: str, *, tag: str | None = None, private: bool = False) -> Pushed:
    """Upload a release, check every file there, and tag the commit. A second call sends nothing.

    The repository is created if there is none. Files of an earlier release that this one lacks are deleted from the
    branch (the earlier tag keeps them); all other files stay. The token is huggingface_hub's own (`hf auth login`,
    HF_TOKEN).

    Args:
        folder: a release.
        repo: `OWNER/NAME`.
        tag: the tag to set; None: `default_tag`.
        private: whether to make a new repository private.

    Raises:
        UserError: the release is damaged; git does not accept the tag, or it belongs to another release; the hub
            refuses or does not answer; its files afterwards differ from those sent.
    """
    from huggingface_hub import HfApi

    tag = default_tag(folder) if tag is None else checked_tag(tag)
    manifest, api = read_manifest(folder), HfApi()
    refuse_damaged(folder, manifest)
    before = compare(folder, manifest, repo)
    try:
        if before.commit is None:
            api.create_repo(repo, private=private, exist_ok=True)
        is_tagged = tag in {ref.name for ref in api.list_repo_refs(repo).tags}
        if is_tagged and compare(folder, manifest, repo, tag).missing:
            raise UserError(f"{repo} has a tag {tag!r} of another release: give this release another tag with --tag")
        commit = before.commit
        if before.missing:
            commit = _upload(folder, before, f"{manifest.name}: {len(manifest.saes)} SAEs")
        after = compare(folder, manifest, repo, commit)
        if after.missing:
            names = ", ".join(file.name for file in after.missing[:3])
            raise UserError(f"{repo} has files that differ from those sent ({names}): another upload may be in "
                            "progress; run the same command again")
        if not is_tagged:
            api.create_tag(repo, tag=tag, revision=commit)
    except hub_exceptions() as error:
        raise refused(error, repo, "upload to hub repository") from error
    return Pushed(repo, str(commit), tag, len(before.missing), len(before.files))


def _upload(folder: Path, before: Comparison, message: str) -> str:
    """Send what the repository lacks; returns the commit."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().upload_folder(
            repo_id=before.repo, folder_path=folder, commit_message=message,
            allow_patterns=[glob.escape(file.name) for file in before.files],
            delete_patterns=[glob.escape(name) for name in _earlier_only(before)] or None).oid)
    except RuntimeError as error:  # raised by huggingface_hub around the reason why a file did not arrive
        raise refused(error, before.repo, "upload to hub repository") from error


def _earlier_only(before: Comparison) -> list[str]:
    """Files of the release on the hub that ours no longer has. The manifest on the hub lists them, so they belong to
    the earlier release."""
    from huggingface_hub import hf_hub_download

    if all(file.state == "new" for file in before.files if file.name == MANIFEST):
        return []
    try:
        there = read_manifest(Path(hf_hub_download(before.repo, MANIFEST, revision=before.commit)).parent)
    except UserError:  # no Olmoscope manifest, so no file is ours
        return []
    return sorted(set(before.others) & set(there.files))
