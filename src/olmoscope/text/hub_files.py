"""Files of hub datasets: addresses `hf://datasets/OWNER/NAME/FILE`, or `.../NAME@REVISION/FILE` for one revision.

`huggingface_hub` fetches and caches them; here its errors become one line for the user.
"""

import contextlib
import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from olmoscope.errors import UserError

SCHEME = "hf://"


def fetch(address: str) -> Path:
    """The local copy of a hub file, downloaded unless it is in the cache.

    Raises:
        UserError: a malformed address, no network, no such repository or file, or no room.
    """
    from huggingface_hub import hf_hub_download

    kind, _, rest = address.removeprefix(SCHEME).partition("/")
    parts = rest.split("/", 2)
    if kind != "datasets" or len(parts) < 3 or not all(parts):
        raise UserError(f"{address} is not of the form hf://datasets/OWNER/NAME/FILE")
    owner, name, file = parts
    name, _, revision = name.partition("@")
    with explained(address):
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=revision or None))


def matching(repo: str, revision: str | None, pattern: str) -> list[str]:
    """Addresses of a dataset repository's files that match a pattern such as `data/*.parquet`, sorted.

    Raises:
        UserError: no network, or no such repository.
    """
    from huggingface_hub import HfApi

    base = f"{SCHEME}datasets/{repo}" + (f"@{revision}" if revision else "")
    with explained(base):
        files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    return [f"{base}/{file}" for file in sorted(files) if fnmatch.fnmatchcase(file, pattern)]


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises in the block into a `UserError` that names the address."""
    from huggingface_hub import errors

    # The base of errors for which no answer came; of httpx or of httpx2, depending on the version of huggingface_hub.
    no_answer = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _no_network(address) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{address}: the hub has no such repository, or it is private or gated; check the name, or log "
                        "in with `hf auth login`") from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{address}: the repository has no such file or revision") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{address}: the hub answers {error.response.status_code}; try again later") from error
    except no_answer as error:
        raise _no_network(address) from error
    except errors.HFValidationError as error:
        raise UserError(f"{address}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{address}: {str(error).splitlines()[0]}") from error


def _no_network(address: str) -> UserError:
    return UserError(f"no network: {address} is not in the cache and the hub does not answer; check the connection "
                     "(and HF_HUB_OFFLINE, HF_ENDPOINT), then run the same command again")
