"""A text named on the command line, as the text of a recipe, with a hash of its content."""

import hashlib
import re
from pathlib import Path
from typing import Any

from olmoscope.errors import UserError
from olmoscope.files import sha256
from olmoscope.recipe.schema import Model, Text
from olmoscope.text import table
from olmoscope.text.dolma import SUFFIXES
from olmoscope.text.template import load_template

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def given_text(text: str, model: Model) -> Text:
    """The text that a command reads, identified by its content: the same files elsewhere are the same text.

    Chats become text by the model's chat template, or as ChatML if it has none.

    Args:
        text: see `given_sources`.

    Raises:
        UserError: it is nothing that can be read, or a hub dataset that cannot be loaded.
    """
    sources = given_sources(text)
    parts = []
    for source in sources:
        if source["kind"] == "hub":
            source["revision"] = _commit(source["repo"])
            parts.append([source["repo"], source["split"], source["revision"]])
        else:
            parts.append([source["kind"], *(sha256(Path(path)) for path in source["paths"])])
    if any(source["kind"] in ("chat", "hub") for source in sources):
        format = "chatml" if load_template(model) is None else "template"
        for source in sources:
            if source["kind"] in ("chat", "hub"):
                source["format"] = format
                parts.append([source["name"], format])
    content = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return Text.model_validate({"sources": sources, "mixture": {source["name"]: 1.0 for source in sources},
                                "content": content, "held_out_share": 0.0})


def given_sources(text: str) -> list[dict[str, Any]]:
    """The sources that a text refers to, as a recipe's keys and values.

    Args:
        text: a file or a folder of files: parquet or JSON lines with a column of texts (`text`) or chats (`messages`,
            `conversations`), else plain text; or a hub dataset, `OWNER/NAME`, `OWNER/NAME:SPLIT`.

    Raises:
        UserError: the text is none of these, or a table without such a column.
    """
    path = Path(text)
    if path.exists():
        kinds: dict[str, list[str]] = {}
        for file in _files(path):
            kinds.setdefault(_kind(file), []).append(str(file.resolve()))
        return [{"kind": kind, "name": kind, "paths": paths} for kind, paths in kinds.items()]
    if match := _HUB.fullmatch(text):
        return [{"kind": "hub", "name": "text", "repo": match[1], "split": match[2] or "train", "column": None}]
    raise UserError(f"--text {text}: there is no file or folder of that name, and it is not a hub dataset (OWNER/NAME)")


def _files(path: Path) -> list[Path]:
    """The file, or the files of a folder, sorted; hidden files are skipped."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and not any(
        part.startswith(".") for part in file.relative_to(path).parts))
    if not found:
        raise UserError(f"--text {path}: the folder has no files")
    return found


def _kind(file: Path) -> str:
    """The kind of source that reads a file; its columns decide."""
    if not file.name.endswith(table.SUFFIXES):
        return "files"
    columns = table.columns_of(file)
    column = table.column_of(columns)
    if column is None and columns:
        raise UserError(f"--text {file}: it has none of the columns {', '.join(table.COLUMNS)} (it has "
                        f"{', '.join(columns[:8])}); name its column in a recipe's source of kind table")
    if column in table.CHAT_COLUMNS:
        return "chat"
    return "dolma" if file.name.endswith(SUFFIXES) else "table"


def _commit(repo: str) -> str:
    """The newest commit of a hub dataset."""
    from huggingface_hub import HfApi

    from olmoscope.text.hub_files import explained

    with explained(f"dataset {repo}", repo, None):
        commit = HfApi().dataset_info(repo).sha
    if commit is None:
        raise UserError(f"dataset {repo}: the hub does not say its commit; download it and give its folder")
    return commit
