"""The embedded corpus: the Python standard library on this machine, as documents and as chats.

Every installation has it, so the demo needs no download. It gives two sources:

- **modules**: each module's source code (`json/decoder.py`);
- **questions**: chats, a question and its answer, from docstrings (`json/__init__.py#dumps`) and from the
  language reference that `pydoc` carries (`topics/assert`).

Docstrings are read with `ast`; no module is imported. The part of an id before `#` is the module's own id, so
a module and the questions about it fall on the same side of the held-out split (split.py). The text has the
licence PSF-2.0.

`write_corpus` puts both on disk in the formats of the real sources: Dolma shards and Dolci parquet shards.
"""

import ast
import gzip
import hashlib
import json
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from olmoscope.errors import UserError
from olmoscope.files import atomic_file, atomic_path, read_json, sha256, write_json
from olmoscope.text.document import Document

LICENSE = "PSF-2.0"

_SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "encodings",  # generated tables of numbers
    "pydoc_data",  # holds the topics, each of which goes to training or to evaluation by itself
})
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # how this machine's Python was built

_MODULE_SHARDS = 6
_CHAT_SHARDS = 3
_MARKER = "corpus.json"
_CORPUS_VERSION = 1
"""Raise this if the same Python gives other documents than before."""

_NO_DATE = "1970-01-01T00:00:00.000Z"
"""Dolma's records carry two dates. None is known here; a fixed one keeps the bytes the same on every run."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; `messages` are `{"role": ..., "content": ...}`, `id` is as in `Document`."""

    id: str
    messages: list[dict[str, str]]


_Item = TypeVar("_Item", Document, Chat)
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[Document]:
    """Every module of the standard library as a document, sorted by id.

    Tests, generated tables, files specific to this machine and empty files are left out.

    Raises:
        UserError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.isdisjoint(relative.parts) or relative.parts[0].startswith(_SKIPPED_PREFIXES):
            continue
        text = _read_source(path)
        if text.strip():
            found = True
            yield Document(text=text, source="modules", id=relative.as_posix())
    if not found:
        raise UserError(f"{root} has no Python sources: the demo's text is the standard library; use a "
                        "Python that comes with its sources, or give a recipe with texts of your own")


def questions() -> Iterator[Chat]:
    """Questions and answers: the topics of `pydoc`, then the docstrings of `modules()`, each id once."""
    from pydoc_data.topics import topics  # half a megabyte of text: loaded only when needed

    for name in sorted(topics):
        yield _chat(f"topics/{name}", f"Explain the Python topic `{name}`.", topics[name])
    for module in modules():
        yield from _docstrings(module)


def write_corpus(folder: Path) -> bool:
    """Write the corpus once, in the formats of the real sources.

    - `dolma/NNN.json.gz`: one JSON object per line, with `id`, `text`, `source`, `added`, `created`, `metadata`;
    - `chat/train-NNNNN-of-NNNNN.parquet`: columns `id`, `messages` (list of `{role, content}`), `source`;
    - `corpus.json`, last: the Python version and the SHA-256 of every file.

    A hash of their ids shuffles the documents, as in the real shards; the bytes are the same whenever the same Python
    writes them. Damaged or missing files are written again.

    Returns:
        Whether anything was written; False if the folder already held the whole corpus.

    Raises:
        UserError: the folder holds another Python's corpus, or cannot be written.
    """
    marker = folder / _MARKER
    made_by = {"version": _CORPUS_VERSION, "python": platform.python_version()}
    if marker.exists():
        written = read_json(marker)
        if not isinstance(written, dict) or {key: written.get(key) for key in made_by} != made_by:
            raise UserError(f"{folder} holds the standard library of another Python, or was written by another version "
                            f"of olmoscope; use the one that wrote it ({marker} names it) or choose another folder")
        if all((folder / name).is_file() and sha256(folder / name) == digest
               for name, digest in written["files"].items()):
            return False
        # The code below replaces damaged files: until it is done, the marker must not vouch for them.
        marker.unlink()

    paths = []
    for number, documents in enumerate(_deal(modules(), _MODULE_SHARDS)):
        paths.append(folder / "dolma" / f"{number:03d}.json.gz")
        _write_dolma(paths[-1], documents)
    for number, chats in enumerate(_deal(questions(), _CHAT_SHARDS)):
        paths.append(folder / "chat" / f"train-{number:05d}-of-{_CHAT_SHARDS:05d}.parquet")
        _write_chats(paths[-1], chats)
    write_json(marker, {**made_by, "license": LICENSE,
                        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in paths}})
    return True


def _deal(items: Iterable[_Item], shards: int) -> list[list[_Item]]:
    """Distribute the items over shards, in an order that looks random but is fixed: by a hash of their ids."""
    order = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
    return [order[number::shards] for number in range(shards)]


def _write_dolma(path: Path, documents: list[Document]) -> None:
    with atomic_file(path) as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        for document in documents:
            record = {"id": document.id, "text": document.text, "source": document.source,
                      "added": _NO_DATE, "created": _NO_DATE,
                      "metadata": {"python": platform.python_version(), "license": LICENSE}}
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _write_chats(path: Path, chats: list[Chat]) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    table = pa.table({
        "id": pa.array([chat.id for chat in chats], pa.string()),
        "messages": pa.array([chat.messages for chat in chats], pa.list_(message)),
        "source": pa.array(["questions"] * len(chats), pa.string()),
    })
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read_source(path: Path) -> str:
    """The text, read in the encoding that the file declares; empty if the declaration is wrong."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _chat(chat_id: str, question: str, answer: str) -> Chat:
    # A literal may spell half a surrogate pair, which no file format can hold.
    answer = answer.strip().encode(errors="replace").decode()
    return Chat(chat_id, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _docstrings(module: Document) -> Iterator[Chat]:
    """A chat for the module and for each public class, function and method that has a docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources are not our concern
        try:
            tree = ast.parse(module.text)
        except SyntaxError:
            return
    name = module.id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    docstring = ast.get_docstring(tree)
    if docstring:
        yield _chat(f"{module.id}#", f"What is the module `{name}` for?", docstring)
    seen = set()
    for path, node in _definitions(tree, ()):
        docstring = ast.get_docstring(node)
        # A name defined twice (by platform, or as a property's getter and setter) gets one question.
        if docstring and path not in seen:
            seen.add(path)
            yield _chat(f"{module.id}#{path}", *_question(node, f"{name}.{path}", docstring))


def _definitions(node: ast.AST, parents: tuple[str, ...]) -> Iterator[tuple[str, _Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            if child.name.startswith("_"):
                continue
            yield ".".join((*parents, child.name)), child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, (*parents, child.name))
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child, parents)


def _question(node: _Definition, name: str, docstring: str) -> tuple[str, str]:
    if isinstance(node, ast.ClassDef):
        return f"What is `{name}`?", docstring
    return f"What does `{name}` do?", f"{name}({ast.unparse(node.args)})\n\n{docstring}"
