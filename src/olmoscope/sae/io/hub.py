"""An SAE's folder from the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from olmoscope.errors import UserError
from olmoscope.hub_errors import hub_exceptions, hub_reason
from olmoscope.model_errors import first_line


def fetch(repo: str, path: str, revision: str | None, formats: Sequence[tuple[str, ...]]) -> Path:
    """Download an SAE's folder into the hub's cache; what is there already is not fetched again.

    Args:
        repo: `OWNER/NAME`.
        path: of the folder in the repository; empty: the repository itself.
        revision: a branch, tag or commit; None: the main branch.
        formats: the files of each format. The first file of each is asked for in turn, until one is there; the others
            come from the same commit.

    Raises:
        UserError: none is there, or the hub does not give it; of several formats, the reason is the first one's.
    """
    from huggingface_hub import hf_hub_download

    prefix = path.strip("/") + "/" if path.strip("/") else ""
    try:
        folder, others = _first_there(repo, prefix, revision, formats)
        commit = folder.parents[len(PurePosixPath(prefix).parts) - 1].name if prefix else folder.name
        for name in others:
            hf_hub_download(repo, prefix + name, revision=commit)
    except hub_exceptions() as error:
        reason = hub_reason(error, repo, revision=revision) or first_line(error)
        raise UserError(f"cannot have {prefix or 'the SAE'} of hub repository {repo}: {reason}") from error
    return folder


def _first_there(repo: str, prefix: str, revision: str | None,
                 formats: Sequence[tuple[str, ...]]) -> tuple[Path, tuple[str, ...]]:
    """The folder of the first format whose first file is there, and that format's other files."""
    from huggingface_hub import errors, hf_hub_download

    absent = []
    for first, *others in formats:
        try:
            return Path(hf_hub_download(repo, prefix + first, revision=revision)).parent, tuple(others)
        except errors.EntryNotFoundError as error:
            absent.append(error)
    raise absent[0]
