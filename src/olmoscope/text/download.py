"""Addresses become local files: downloaded once, resumed when interrupted, kept in a cache.

The cache is `$OLMOSCOPE_CACHE`, else `olmoscope` in `$XDG_CACHE_HOME`, else `~/.cache/olmoscope`. A file that is there
under its final name is complete, and is not requested again. What has arrived so far is kept in `NAME.part`,
beside `NAME.part.json` with what the server said about the file, so that another run resumes only with the same
content. One process downloads a file; others that want it wait for a lock, which the kernel frees when its holder
ends, and then find the file. (A separate part file for every process would need no waiting, but workers that start
together would fetch the same gigabytes several times, and none could resume another's download.)

`hf://datasets/OWNER/NAME/FILE` goes through `huggingface_hub`, which has its own cache and resumes by itself.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import olmoscope
from olmoscope import progress
from olmoscope.errors import UserError
from olmoscope.files import read_json, sync_folder, write_json
from olmoscope.text import hub_files
from olmoscope.text.cache import cache_folder

USER_AGENT = f"olmoscope/{olmoscope.__version__}"
"""The host that serves Dolma refuses Python's default user agent."""

_TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as lost."""

_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry; a try that brought new bytes restarts the series."""

_CHUNK_BYTES = 1 << 18


class _Interrupted(Exception):
    """A failure that a retry may overcome."""


def is_remote(address: str) -> bool:
    """Whether an address must be fetched, and is not a local path."""
    return address.startswith(("http://", "https://", hub_files.SCHEME))


def fetch(address: str) -> Path:
    """The local file for an address: an http(s) or `hf://` address, or a local path, which is returned as it is.

    Raises:
        UserError: there is no network, no such file or no room on the disk, or the download never completes.
    """
    if address.startswith(hub_files.SCHEME):
        return hub_files.fetch(address)
    if not is_remote(address):
        return Path(address)
    path = _cached(address)
    if not path.exists():
        with _alone(path):
            if not path.exists():  # another process may have finished it while this one waited
                _download(address, path)
    return path


def _cached(url: str) -> Path:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url} is not an address: {error}") from error
    name = PurePosixPath(parts.path).name
    # The hash separates files of the same name; the name keeps its suffix, which says how to read the file.
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return cache_folder() / "downloads" / parts.netloc.rpartition("@")[2] / digest / (name.strip(".") or "index")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("a")
    except OSError as error:
        raise _cannot_write(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.console.print(f"waiting for another process that is downloading {path.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    about = path.with_name(f"{path.name}.part.json")
    furthest = _size(part)
    failures = 0
    while True:
        try:
            _try(url, part, about)
            break
        except _Interrupted as error:
            if _size(part) > furthest:
                furthest, failures = _size(part), 0
            if failures == len(_WAITS):
                raise UserError(f"cannot download {url}: {error}; check the network and run the same command again: "
                                "what has arrived is kept") from error
            time.sleep(_WAITS[failures])
            failures += 1
    try:
        part.replace(path)
        sync_folder(path.parent)
        about.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def _try(url: str, part: Path, about: Path) -> None:
    """Download the rest of `part`.

    Raises:
        _Interrupted: the download did not complete; a retry may help.
        UserError: it can never complete.
    """
    known: dict[str, Any] = read_json(about) if part.exists() and about.exists() else {}
    done = _size(part) if known else 0
    if known and done == known["size"]:
        return  # an earlier run ended between the last byte and the rename
    with contextlib.closing(_open(url, done, known, part)) as response:
        resumed = response.status == 206
        size = _full_size(response, done)
        if resumed and (size is None or size != known["size"]):
            part.unlink()
            raise _Interrupted("the file has changed on the server")
        if not resumed:
            part.unlink(missing_ok=True)
            done = 0
            write_json(about, {"url": url, "size": size, "validator": _validator(response)})
        with progress.bar(f"downloading {part.stem}", size, "bytes", done=done) as advance:
            _receive(response, part, advance)
    if size is not None and _size(part) != size:
        raise _Interrupted(f"the connection closed at {_size(part)} of {size} bytes")


def _open(url: str, done: int, known: dict[str, Any], part: Path) -> http.client.HTTPResponse:
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        # Without a validator, only the size, compared afterwards, shows whether it is the same file.
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.unlink(missing_ok=True)
            raise _Interrupted("the server does not hold as much as it said") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
        raise UserError(f"cannot download {url}: the server answers {error.code} {error.reason}; "
                        "check the address") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _Interrupted(f"no network, or the server does not answer ({reason})") from error
    if response.status not in ((200, 206) if done else (200,)):
        response.close()
        raise UserError(f"cannot download {url}: the server answers {response.status} {response.reason}")
    return response


def _full_size(response: http.client.HTTPResponse, done: int) -> int | None:
    """Bytes of the whole file; None if the server does not say."""
    if response.status == 206:
        found = re.fullmatch(rf"bytes {done}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        return int(found[1]) if found else None
    return response.length


def _validator(response: http.client.HTTPResponse) -> str | None:
    """The value for `If-Range`: a strong ETag, else the date."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _receive(response: http.client.HTTPResponse, part: Path, advance: Callable[[int], None]) -> None:
    try:
        with part.open("ab") as file:
            while chunk := _read(response):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(part, error) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"the connection broke ({error})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room there, or set OLMOSCOPE_CACHE to another "
                     "folder, and run the same command again")
