"""Download a release from the Hugging Face hub, and check it.

huggingface_hub does the transfer, and goes on where a cut connection or a kill stopped it.
"""

import glob
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.hub_errors import hub_exceptions
from olmoscope.release.layout import differing_files
from olmoscope.release.manifest import MANIFEST, ManifestRead, read_manifest
from olmoscope.release.on_hub import refused


def pull(repo: str, folder: Path, *, revision: str | None = None, only: list[str] | None = None) -> ManifestRead:
    """Download a release of ours and check every file by the manifest's checksum. Doing it again gets what is missing.

    Args:
        repo: `OWNER/NAME`.
        folder: where to put it.
        revision: a branch, tag or commit; None: the main branch.
        only: ids of the SAEs wanted; None: all.

    Raises:
        UserError: it is no release of ours, it has no such SAE, a file is damaged, the hub refuses or does not answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
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
        raise UserError(f"{folder} is not what the manifest of {repo} says: {', '.join(wrong)} differ; delete them and "
                        "pull again. If that does not help, what is on the hub is damaged or half uploaded: ask for a "
                        f"tag, `olmoscope pull {repo}@TAG`")
    return manifest
