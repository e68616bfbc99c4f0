"""A recipe's sources, resolved: which shards each has, and how to read a shard from any row."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from olmoscope.errors import UserError
from olmoscope.recipe import sources as recipe_sources
from olmoscope.text import dolma, hub_files, plain, table
from olmoscope.text.chat import ToText, hand_rendered
from olmoscope.text.download import fetch, is_remote
from olmoscope.text.row import Malformed, Row


@dataclass(frozen=True)
class Source:
    """A named source of documents."""

    name: str
    addresses: list[str]
    """Its shards, as messages call them: paths, addresses, or `dataset shard N`."""
    names: list[str]
    """Its shards, as ids call them: the same on every machine (addresses without the folders they share)."""
    read: Callable[[int, int], Iterator[Row | Malformed]]
    """`read(shard, start)`: the rows of a shard from row `start` on; fetches the shard if it is not local yet."""


def resolve(source: recipe_sources.Source, template: ToText | None = None) -> Source:
    """List a source's shards. Lists are fetched now, shards only when they are read.

    Args:
        template: the model's chat template, if the source's `format` is `template`.

    Raises:
        UserError: nothing matches a path, a list or a repository is empty or cannot be fetched, or a shard's format is
            unknown.
    """
    match source:
        case recipe_sources.DolmaSource():
            addresses = _local(source.name, source.paths)
            if source.url_list is not None:
                addresses += _listed(source.name, source.url_list)
            for address in addresses:
                if not address.endswith(dolma.SUFFIXES):
                    raise UserError(f"source {source.name}: {address} is not a Dolma shard; its name must end in one "
                                    f"of {' '.join(dolma.SUFFIXES)}")
            return _of_files(source.name, addresses, "paths or url_list", dolma.read)
        case recipe_sources.ChatSource():
            to_text = _to_text(source.format, template)
            return _of_files(source.name, _table_files(source), "paths or repo", lambda path, name, start:
                             table.read_chats(path, name, start, source.column, to_text))
        case recipe_sources.TableSource():
            to_text = _to_text(source.format, template)
            return _of_files(source.name, _table_files(source), "paths or repo", lambda path, name, start:
                             table.read_texts(path, name, start, source.column, to_text))
        case recipe_sources.HubSource():
            from olmoscope.text.hub import HubDataset

            dataset = HubDataset(source, _to_text(source.format, template))
            names = [f"{source.repo} shard {shard}" for shard in range(dataset.shards)]
            return Source(source.name, names, names, dataset.read)
        case recipe_sources.FilesSource():
            return _of_files(source.name, _local(source.name, source.paths), "paths", plain.read)


def _to_text(format: recipe_sources.ChatFormat, template: ToText | None) -> ToText:
    if format != "template":
        return hand_rendered(format)
    assert template is not None, "give the template of the recipe's model (template.py)"
    return template


def _table_files(source: recipe_sources.ChatSource | recipe_sources.TableSource) -> list[str]:
    addresses = _local(source.name, source.paths)
    if source.repo is not None:
        found = hub_files.matching(source.repo, source.revision, source.files)
        if not found:
            raise UserError(f"source {source.name}: dataset {source.repo} has no file that matches {source.files!r}; "
                            "change the source's `files`")
        addresses += found
    return addresses


def _of_files(name: str, addresses: list[str], keys: str,
              read: Callable[[Path, str, int], Iterator[Row | Malformed]]) -> Source:
    if not addresses:
        raise UserError(f"source {name} has no shards: give {keys}")
    addresses = list(dict.fromkeys(addresses))
    names = _without_shared_folders(addresses)
    return Source(name, addresses, names, lambda shard, start: read(fetch(addresses[shard]), names[shard], start))


def _local(source: str, patterns: list[str]) -> list[str]:
    """The files that paths and globs name, pattern by pattern, sorted within each."""
    found = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"source {source}: {pattern} is a folder; say which files in it, e.g. {pattern}/*")
        # A name with brackets in it may be meant literally. (Before Python 3.13, Path.glob takes no absolute pattern.
        # It would also match hidden files, which are unfinished.)
        matches = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = [match for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f"source {source}: no file matches {pattern!r} (looked from {Path.cwd()}); name the files "
                            "under text.sources in the recipe, or with --set 'text.sources.0.paths=[FILE, ...]'")
        found += files
    return found


def _listed(source: str, url_list: str) -> list[str]:
    """The addresses in a list of shards; blank lines and `#` comments are skipped."""
    path = fetch(url_list)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"source {source}: the list of shards {url_list} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source {source}: the list of shards {url_list} cannot be read: {error}") from error
    addresses = [line for line in lines if line and not line.startswith("#")]
    if not addresses:
        raise UserError(f"source {source}: the list of shards {url_list} is empty")
    for address in addresses:
        if not is_remote(address) and not Path(address).is_file():
            raise UserError(f"source {source}: {address}, listed in {url_list}, is neither a file nor an http(s) or "
                            "hf:// address")
    return addresses


def _without_shared_folders(addresses: list[str]) -> list[str]:
    """Names for files: their addresses without the folders that all of them share."""
    parts = [PurePosixPath(address).parts for address in addresses]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return ["/".join(each[shared:]) for each in parts]
