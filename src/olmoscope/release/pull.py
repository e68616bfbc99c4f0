"""Download a release from the Hugging Face hub, and check it.

huggingface_hub transfers the files, and resumes after a lost connection or a kill.
"""

import glob
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.hub_errors import hub_exceptions
from olmoscope.hub_reach import asking_hub
from olmoscope.release.layout import differing_files
from olmoscope.release.manifest import MANIFEST, ManifestRead, read_manifest
from olmoscope.release.on_hub import refused


def pull(repo: str, folder: Path, *, revision: str | None = None, only: list[str] | None = None) -> ManifestRead:
    """Download an Olmoscope release and check every file against the manifest. A second call gets only what is missing.

    Args:
        repo: `OWNER/NAME`.
        folder: where to put it.
        revision: a branch, tag or commit; None: the main branch.
        only: ids of the SAEs wanted; None: all.

    Raises:
        UserError: it is not an Olmoscope release, it has no such SAE, a file is damaged, or the hub refuses or does not
            answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        with asking_hub():
            hf_hub_download(repo, MANIFEST, revision=revision, local_dir=folder)
    except hub_exceptions() as error:
        raise refused(error, repo, "get a release from hub repository", revision) from error
    manifest = read_manifest(folder)
    unknown = set(only or ()) - {sae.id for sae in manifest.saes}
    if unknown:
        raise UserError(f"{repo} has no SAE {', '.join(sorted(unknown))}; it has "
                        f"{', '.join(sae.id for sae in manifest.saes)}")
    wanted = [name for name in manifest.files
              if not only or "/" not in name or name.rpartition("/")[0] in only]
    try:
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=[glob.escape(n) for n in wanted])
    except hub_exceptions() as error:
        raise refused(error, repo, "get a release from hub repository", revision) from error
    wrong = differing_files(folder, manifest, wanted)
    if wrong:
        raise UserError(f"{folder} does not match the manifest of {repo}: {', '.join(wrong)} differ; delete them and "
                        "pull again. If that does not help, the files on the hub are damaged or an upload is "
                        f"incomplete: pull a tag, `olmoscope pull {repo}@TAG`")
    return manifest
