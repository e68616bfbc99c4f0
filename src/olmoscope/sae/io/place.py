"""Where an SAE's files are, on this machine or on the hub (hub.py): listed and looked into first, fetched only to be
loaded. What a file holds is seen from its header (headers.py).
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
        name: what the user called it.
        file: the name of the file, where one was named; None: the whole folder.
        registered: what SAELens' registry says of it, if it was named by that.
    """

    def __init__(self, name: str, file: str | None, registered: Registered | None) -> None:
        self.name, self.file, self.registered = name, file, registered
        self._headers: dict[str, Header] = {}

    @property
    @abstractmethod
    def words(self) -> str:
        """The whole path, with the repository's name: some formats keep the model or the layer in it alone."""

    @cached_property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """All files in the folder, those in folders below it too, by their paths in it; sorted."""

    @cached_property
    @abstractmethod
    def beside(self) -> Sequence[str]:
        """The files in the folder itself, sorted."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this path, which may begin with `../`."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Of a file, in bytes."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file, to look into."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A file on this machine: downloaded if it must be.

        Raises:
            UserError: it cannot be had.
        """

    @abstractmethod
    def at_name(self, name: str) -> str:
        """What a user calls a file or folder in this folder."""

    @abstractmethod
    def where(self, name: str | None = None) -> str:
        """The place, or a file of it, for messages."""

    def only(self, *suffixes: str) -> str | None:
        """The file that was named, or the only one in the folder, if its name ends like this; None: there is none."""
        if self.file is not None:
            return self.file if self.file.endswith(suffixes) else None
        found = [name for name in self.beside if name.endswith(suffixes)]
        return found[0] if len(found) == 1 else None

    def header(self, name: str) -> Header:
        """The tensors in a file.

        Raises:
            UserError: damaged, a pickle that would execute code, or missing.
        """
        if name not in self._headers:
            with self.open(name) as file:
                self._headers[name] = read_header(file, self.where(name))
        return self._headers[name]

    def json(self, name: str) -> Any:
        """What stands in a JSON file.

        Raises:
            UserError: it is none, or missing.
        """
        path = self.fetch(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(damage(path) or f"{path} is damaged (not JSON: {error})") from error

    def mapping(self, name: str) -> dict[str, Any]:
        """What stands in a JSON or YAML file that holds a mapping.

        Raises:
            UserError: it holds something else, or is missing.
        """
        found = self.yaml(name) if name.endswith((".yaml", ".yml")) else self.json(name)
        if not isinstance(found, dict):
            raise UserError(f"{self.where(name)} is damaged: it holds no mapping")
        return found

    def yaml(self, name: str) -> Any:
        """What stands in a YAML file.

        Raises:
            UserError: it is none, or missing.
        """
        path = self.fetch(name)
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged (no YAML: {first_line(error)})") from error


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
            raise UserError(f"{path} is missing")
        return path

    def at_name(self, name: str) -> str:
        return str(self.folder / name)

    def where(self, name: str | None = None) -> str:
        return str(self.path if name is None else self.folder / name)
