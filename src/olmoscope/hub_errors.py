"""What went wrong with the Hugging Face hub, in one line: the true cause, and what to do about it.

The message blames the network only if no answer came, not if the hub refuses or `HF_HUB_OFFLINE` forbids the request.
"""

import re
from collections.abc import Iterator
from typing import Literal

from olmoscope.hub_reach import no_answer, unanswered

Kind = Literal["model", "dataset"]
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d+)")
"""How hf_xet 1.8.0 names the status of an answer."""
_PAGE = {"model": "https://huggingface.co/", "dataset": "https://huggingface.co/datasets/"}


def hub_exceptions() -> tuple[type[Exception], ...]:
    """Every exception that huggingface_hub raises if it cannot provide something."""
    from huggingface_hub import errors

    return (OSError, errors.EntryNotFoundError, errors.HFValidationError, no_answer())


def is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked: no answer came, or it must not be asked (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import errors

    return isinstance(error, (errors.OfflineModeIsEnabled, no_answer())) and not isinstance(error,
                                                                                             errors.HfHubHTTPError)


def hub_reason(error: BaseException, repo: str, kind: Kind = "model", revision: str | None = None, *,
               cached: bool = True) -> str | None:
    """Why the hub, or its cache, does not provide something from a repository; None if the error has another cause.

    Args:
        error: the exception; its causes are examined too.
        repo: `OWNER/NAME`.
        cached: whether the hub's cache on this machine could have provided it.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, errors.GatedRepoError):
            return _gated(repo, kind)
        if isinstance(one, errors.RepositoryNotFoundError):
            return f"the hub has no such {kind}, or it is private: check the name, or log in with `hf auth login`"
        if isinstance(one, errors.RevisionNotFoundError):
            return f"{repo} has no revision {revision!r}: see {_PAGE[kind]}{repo}/tree/main for its branches and tags"
        if isinstance(one, errors.DisabledRepoError):
            return f"the hub has closed {repo}: see {_PAGE[kind]}{repo}"
        if isinstance(one, errors.HfHubHTTPError) and isinstance(one, errors.EntryNotFoundError):
            return f"{repo} has no file {str(one.response.url).partition('/resolve/')[2].partition('/')[2]}"
        if isinstance(one, errors.HfHubHTTPError):
            return _answer(one.response.status_code)
        if isinstance(one, errors.HFValidationError):
            return f"{repo!r} is not the name of a hub repository (OWNER/NAME)"
        if isinstance(one, errors.OfflineModeIsEnabled):
            return _offline(cached)
        if isinstance(one, errors.FileMetadataError):
            return f"{_endpoint()} does not answer as a hub does: check HF_ENDPOINT and proxies"
        if isinstance(one, ConnectionError) and constants.HF_HUB_OFFLINE:
            return _offline(cached)
        if isinstance(one, (ConnectionError, no_answer())) or "Consistency check failed" in str(one):
            return _xet(one) or _network(one)
    if any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain):
        return _offline(cached)
    return None


def _gated(repo: str, kind: Kind) -> str:
    from huggingface_hub import get_token

    reason = f"it is gated: accept its licence at {_PAGE[kind]}{repo}"
    if get_token() is None:
        return f"{reason} and log in with `hf auth login`"
    return f"{reason}; the account that is logged in here has no access (`hf auth login` changes the account)"


def _answer(status: int) -> str:
    """What to do about an answer that is not a file."""
    from huggingface_hub import get_token

    if status in (401, 403) and get_token() is None:
        return f"the hub refuses access (status {status}): log in with `hf auth login`"
    if status in (401, 403):
        return (f"the hub refuses access (status {status}): the token that is logged in here is not valid or may not "
                "do this; log in again with `hf auth login`")
    if status == 429:
        return "the hub has had too many requests from here (status 429): wait a few minutes, or log in"
    return f"the hub answers with an error (status {status}): try again later"


def _offline(cached: bool) -> str:
    from huggingface_hub import constants

    if not cached:
        reason = unanswered()
        return ("HF_HUB_OFFLINE forbids asking the hub: unset it" if reason is None
                else _unreachable(f"{_endpoint()} did not answer ({reason})"))
    cache = f"it is not in the hub's cache ({constants.HF_HUB_CACHE})"
    if (reason := unanswered()) is not None:
        return _unreachable(f"{_endpoint()} did not answer ({reason}), and {cache}")
    if constants.HF_HUB_OFFLINE:
        return f"{cache}, and HF_HUB_OFFLINE forbids asking the hub: unset it, or fill the cache first"
    return f"{cache}, and the hub was not asked"


def _xet(error: BaseException) -> str | None:
    """Why hf_xet failed, if the hub answered it: its errors of that kind are `ConnectionError`s too."""
    found = _XET_STATUS.search(str(error))
    if found is None:
        return None
    if found[1] == "404":
        return (f"{_endpoint()} answers hf_xet with status 404, as a hub without Xet storage does: set "
                "HF_HUB_DISABLE_XET=1 to send large files by LFS, and run the same command again")
    return _answer(int(found[1]))


def _network(error: BaseException) -> str:
    what = str(error).strip().split("\n")[0] or type(error).__name__
    return _unreachable(f"{_endpoint()} did not answer, or its answer was cut off ({what})")


def _unreachable(what: str) -> str:
    return f"no network: {what}; check the connection and run the same command again"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
