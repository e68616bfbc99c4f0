"""A text that somebody names on the command line, as sources of a recipe."""

import re
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.text.dolma import SUFFIXES


def given_sources(text: str) -> list[dict[str, Any]]:
    """The sources that a text stands for, as a recipe's keys and values.

    Args:
        text: a file or a folder of files (Dolma shards, chats in parquet, else plain text), or a hub dataset,
            `OWNER/NAME`, `OWNER/NAME:SPLIT`.

    Raises:
        UserError: none of these.
    """
    path = Path(text)
    if path.exists():
        kinds: dict[str, list[str]] = {}
        for file in _files(path):
            kind = "dolma" if file.name.endswith(SUFFIXES) else "chat" if file.suffix == ".parquet" else "files"
            kinds.setdefault(kind, []).append(str(file.resolve()))
        return [{"kind": kind, "name": kind, "paths": paths} | ({"format": "chatml"} if kind == "chat" else {})
                for kind, paths in kinds.items()]
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", text):
        return [{"kind": "hub", "name": "text", "repo": match[1], "split": match[2] or "train"}]
    raise UserError(f"--text {text}: there is no file or folder of that name, and it is no hub dataset (OWNER/NAME)")


def _files(path: Path) -> list[Path]:
    """The file, or the files of a folder, sorted; hidden ones are passed over."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts))
    if not found:
        raise UserError(f"--text {path}: the folder has no files")
    return found
