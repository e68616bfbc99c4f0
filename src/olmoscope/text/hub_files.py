"""Files of hub datasets: addresses `hf://datasets/OWNER/NAME/FILE`, or `.../NAME@REVISION/FILE` for one revision.

`huggingface_hub` fetches and caches them; here its errors become one line for the user.
"""

import contextlib
import errno
import fnmatch
import hashlib
from collections.abc import Iterator
from pathlib import Path

from olmoscope.errors import UserError
from olmoscope.files import read_json, write_json
from olmoscope.hub_errors import hub_exceptions, hub_reason, is_unreachable
from olmoscope.hub_reach import asking_hub
from olmoscope.model_errors import first_line
from olmoscope.text.cache import cache_folder

SCHEME = "hf://"


def fetch(address: str) -> Path:
    """The local copy of a hub file, downloaded unless it is in the cache.

    Raises:
        UserError: the address is malformed, or there is no network, no such repository or file, or no room.
    """
    from huggingface_hub import hf_hub_download

    kind, _, rest = address.removeprefix(SCHEME).partition("/")
    parts = rest.split("/", 2)
    if kind != "datasets" or len(parts) < 3 or not all(parts):
        raise UserError(f"{address} is not of the form hf://datasets/OWNER/NAME/FILE")
    owner, name, file = parts
    name, _, revision = name.partition("@")
    with explained(address, f"{owner}/{name}", revision or None):
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=revision or None))


def matching(repo: str, revision: str | None, pattern: str) -> list[str]:
    """Addresses of a dataset repository's files that match a pattern such as `data/*.parquet`, sorted.

    If the hub cannot be reached, the last listing that it gave is used.

    Raises:
        UserError: there is no such repository, or the hub cannot be reached and there is no earlier listing.
    """
    base = f"{SCHEME}datasets/{repo}" + (f"@{revision}" if revision else "")
    with explained(base, repo, revision):
        files = _files(repo, revision)
    return [f"{base}/{file}" for file in sorted(files) if fnmatch.fnmatchcase(file, pattern)]


def _files(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    name = hashlib.sha256(f"{repo}@{revision or 'main'}".encode()).hexdigest()[:16]
    listing = cache_folder() / "listings" / f"{name}.json"
    try:
        files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except hub_exceptions() as error:
        if not is_unreachable(error) or not listing.exists():
            raise
        return list(read_json(listing)["files"])
    write_json(listing, {"repo": repo, "revision": revision, "files": files})
    return files


@contextlib.contextmanager
def explained(address: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn what `huggingface_hub` raises in the block into a `UserError` that names the address."""
    try:
        with asking_hub():
            yield
    except hub_exceptions() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the command line has its own message for a full disk
        raise UserError(f"{address}: {hub_reason(error, repo, 'dataset', revision) or first_line(error)}") from error
