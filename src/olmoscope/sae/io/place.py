"""The place of an SAE's files, on this machine or on the hub (hub.py). Files are listed, and their headers read
(headers.py), before any is downloaded.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from olmoscope.errors import UserError
from olmoscope.model_errors import damage, first_line
from olmoscope.sae.io.headers import Header, read_header
from olmoscope.sae.io.registered import Registered


class Place(ABC):
    """A folder of files, or one file in it.

    Attributes:
        name: the address that the user gave.
        file: the file's name; None for a folder.
        registered: its entry in SAELens' registry, if the address was `saelens:RELEASE/ID`.
    """

    def __init__(self, name: str, file: str | None, registered: Registered | None) -> None:
        self.name, self.file, self.registered = name, file, registered
        self._headers: dict[str, Header] = {}

    @property
    @abstractmethod
    def words(self) -> str:
        """The whole path, with the repository's name: some formats state model and layer only there."""

    @cached_property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The paths of all files in the folder and below it, relative to it, sorted."""

    @cached_property
    @abstractmethod
    def beside(self) -> Sequence[str]:
        """The names of the files in the folder itself, sorted."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the file exists. Its path may begin with `../`."""

    @abstractmethod
    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file to read its header."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """The path of a file on this machine; a file on the hub is downloaded.

        Raises:
            UserError: it is missing, or the hub does not give it.
        """

    @abstractmethod
    def at_name(self, name: str) -> str:
        """The address of a file or folder in this folder."""

    @abstractmethod
    def where(self, name: str | None = None) -> str:
        """The place, or a file in it, as messages name it."""

    def only(self, *suffixes: str) -> str | None:
        """The file itself, or the only file in the folder with one of these suffixes; None if there is no such file."""
        if self.file is not None:
            return self.file if self.file.endswith(suffixes) else None
        found = [name for name in self.beside if name.endswith(suffixes)]
        return found[0] if len(found) == 1 else None

    def header(self, name: str) -> Header:
        """The header of a file of tensors.

        Raises:
            UserError: damaged, a pickle that would execute code, or missing.
        """
        if name not in self._headers:
            with self.open(name) as file:
                self._headers[name] = read_header(file, self.where(name))
        return self._headers[name]

    def json(self, name: str) -> Any:
        """The content of a JSON file.

        Raises:
            UserError: not JSON, or missing.
        """
        path = self.fetch(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(damage(path) or f"{path} is damaged (not JSON: {error})") from error

    def mapping(self, name: str) -> dict[str, Any]:
        """The mapping in a JSON or YAML file.

        Raises:
            UserError: it holds something else, or is missing.
        """
        found = self.yaml(name) if name.endswith((".yaml", ".yml")) else self.json(name)
        if not isinstance(found, dict):
            raise UserError(f"{self.where(name)} is damaged: it does not hold a mapping; download it again")
        return found

    def yaml(self, name: str) -> Any:
        """The content of a YAML file.

        Raises:
            UserError: not YAML, or missing.
        """
        path = self.fetch(name)
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged (not YAML: {first_line(error)})") from error


class Here(Place):
    """A folder or file on this machine."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(name or str(path), None if path.is_dir() else path.name, None)
        self.path, self.folder = path, path if path.is_dir() else path.parent

    @property
    def words(self) -> str:
        return self.path.resolve().as_posix()

    @cached_property
    def names(self) -> Sequence[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    @cached_property
    def beside(self) -> Sequence[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return self.fetch(name).open("rb")

    def fetch(self, name: str) -> Path:
        if not (path := self.folder / name).is_file():
            raise UserError(f"{path} is missing: download the SAE's whole folder again")
        return path

    def at_name(self, name: str) -> str:
        return str(self.folder / name)

    def where(self, name: str | None = None) -> str:
        return str(self.path if name is None else self.folder / name)
