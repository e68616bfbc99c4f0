"""Check everything that a store claims: every checksum, every count, and that activations belong to their tokens.

Each problem says what is wrong with which file. The result lists what to delete so that `olmoscope collect` makes it
again. What collection does not make (other people's files, a newer format, another recipe's manifest) is reported and
left alone.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from olmoscope.activations.store.consistency import disagreements
from olmoscope.activations.store.format import VERSION, Manifest, has_segment, read_manifest, segment_checksum
from olmoscope.activations.store.inspect import find_stores, finished_segments, segment_numbers
from olmoscope.activations.store.single_file import (
    blocks_fit,
    folders_of,
    how_damaged,
    is_complete,
    json_or_none,
    rows_of_tokens,
    same_rows,
    shape_mistake,
    sums_or_none,
)
from olmoscope.activations.store.statistics import add_up, in_terms_of_now
from olmoscope.errors import UserError
from olmoscope.files import files_below, is_locked, sha256
from olmoscope.progress import bar
from olmoscope.tokens.segments import read_tensors, segment_name, token_checksum

READERS = 4
"""How many files are hashed at a time: one core hashes 1 to 2 GB/s, less than a fast disk delivers."""

OWN = re.compile(r"manifest\.json|statistics\.(json|safetensors)|tokens/(index|recipe)\.json|(.*/)?\.[^/]*")
"""Files of a store that belong to no segment; hidden files are locks, or belong to the file system."""
SEGMENT_FILE = re.compile(r"(tokens|rows|statistics|layer_\d+\w*|embed)/segment-(\d{6,})\.safetensors"
                          r"|checksums/(?:segment|tokens)-(\d{6,})\.json")
SEGMENT_FOLDERS = ("rows", "statistics", "layer_*", "embed")
"""The folders of the files that are made from a segment's tokens."""
SITE_FOLDERS = ("layer_", "embed/")
TEMPORARY = re.compile(r"((?:.*/)?\.[^/]*\.tmp)(?:/.*)?")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of a store."""

    path: Path
    what: str
    mends: bool
    """Whether `collect` makes it again once what is damaged is deleted."""


@dataclass(frozen=True)
class Verified:
    """What was checked, and what is wrong."""

    store: Path
    problems: list[Problem]
    delete: list[Path]
    """What to delete, in this order, so that `collect` makes it again."""
    live: bool
    """Whether a process was writing the store; if so, what it had not finished is not a problem."""
    segments: int
    done: int
    """How many segments have activations."""
    bytes: int
    """How many bytes were read and compared with checksums."""


def verify_stores(path: Path) -> list[Verified]:
    """Verify the store at a path, or both stores of an output folder, and that they belong to it and to each other.

    Raises:
        UserError: there is no store.
    """
    stores = find_stores(path)
    return with_disagreements([verify(store, live=is_locked(store)) for store in stores])


def with_disagreements(verified: list[Verified]) -> list[Verified]:
    """The same, with disagreements between the stores, or with their output folder, added to the problems."""
    found = list(disagreements([one.store for one in verified]))
    return [replace(one, problems=one.problems + [Problem(path, what, mends=False) for path, what in found
                                                  if path.is_relative_to(one.store)]) for one in verified]


def verify(store: Path, *, live: bool) -> Verified:
    """Read a whole store and compare it with everything that it claims.

    Args:
        live: whether another process is writing it; if so, unfinished parts are not problems.
    """
    return _Verification(store, live).run()


class _Verification:
    def __init__(self, store: Path, live: bool) -> None:
        self.store = store
        self.live = live
        self.problems: list[Problem] = []
        self.damaged: set[Path] = set()
        self.expected: dict[Path, tuple[str, int]] = {}
        """For every file that exists: its expected checksum, and its segment."""
        self.bad_tokens: set[int] = set()
        self.bad_segments: set[int] = set()
        self.bad_files: list[Path] = []

    def run(self) -> Verified:
        manifest = self._manifest()
        if any(not problem.mends for problem in self.problems):  # another format: nothing else can be checked
            return Verified(self.store, self.problems, [], self.live, 0, 0, 0)
        index = self._index()
        count = self._count(index, manifest)
        self._check_recipe(count)
        self._expect_tokens(count, index)
        self._expect_segments(count, manifest)
        hashed = self._hash()
        rows = self._check_tokens(count, index)
        for segment in range(count):
            self._check_segment(segment, manifest, rows.get(segment))
        if manifest is not None and index is not None:
            self._check_counts(manifest, index)
        if manifest is not None and manifest.finished and not self.problems:
            self._check_statistics(manifest)
        self._find_strangers(count, manifest)
        done = sum(has_segment(self.store, segment) for segment in range(count))
        return Verified(self.store, self.problems, self._delete(), self.live, count, done, hashed)

    def _add(self, path: Path, what: str, *, mends: bool = True) -> None:
        if path not in self.damaged:
            self.damaged.add(path)
            self.problems.append(Problem(path, what, mends))

    def _bad_token(self, segment: int, path: Path, what: str) -> None:
        self._add(path, what)
        self.bad_tokens.add(segment)

    def _bad_segment(self, segment: int, path: Path, what: str) -> None:
        self._add(path, what)
        self.bad_segments.add(segment)

    def _bad_file(self, path: Path, what: str) -> None:
        self._add(path, what)
        self.bad_files.append(path)

    def _manifest(self) -> Manifest | None:
        path = self.store / "manifest.json"
        lost = "and with it the model's revision: check that the recipe's model.revision is the one that was used"
        if not path.exists():
            if finished_segments(self.store):
                self._add(path, f"missing, {lost}")
            return None
        try:
            return read_manifest(self.store)
        except UserError as error:
            value = json_or_none(path)
            if isinstance(value, dict) and (value.get("format") != "olmoscope activation store" or
                                            (isinstance(value.get("version"), int) and value["version"] > VERSION)):
                self._add(path, str(error), mends=False)
            else:
                self._bad_file(path, f"damaged, {lost}")
            return None

    def _index(self) -> dict[str, Any] | None:
        """The token stage's index; None if it is missing (packing is not finished) or damaged."""
        path = self.store / "tokens" / "index.json"
        if not path.exists():
            if (self.store / "manifest.json").exists():  # it is written after the index
                self._add(path, "missing")
            return None
        index = json_or_none(path)
        try:
            if all(isinstance(rows, int) for rows in index["rows"]):
                return {"rows": index["rows"],
                        "tokens": {name: int(source["tokens"]) for name, source in index["sources"].items()}}
        except (TypeError, KeyError, ValueError, AttributeError):
            pass
        self._bad_file(path, "damaged")
        return None

    def _count(self, index: dict[str, Any] | None, manifest: Manifest | None) -> int:
        """How many segments there should be, from the best source that is left."""
        if index is not None:
            return len(index["rows"])
        if manifest is not None:
            return manifest.segments
        return max(segment_numbers(self.store / "tokens"), default=-1) + 1

    def _check_recipe(self, count: int) -> None:
        """Check tokens/recipe.json, which keeps another recipe from continuing with these tokens."""
        path = self.store / "tokens" / "recipe.json"
        value = json_or_none(path)
        if not path.exists():
            if count:
                self._add(path, "missing")
        elif not isinstance(value, dict) or "tokens_hash" not in value:
            self._bad_file(path, "damaged")

    def _expect_tokens(self, count: int, index: dict[str, Any] | None) -> None:
        for segment in range(count):
            path, checksum = self.store / "tokens" / segment_name(segment), token_checksum(self.store, segment)
            listed = sums_or_none(checksum)
            if not path.exists():
                self._bad_token(segment, path, "missing")
            elif not checksum.exists():
                # For the last segment this is no damage: its checksum is written after its tokens, and packing may
                # have stopped between the two, or be there now.
                if index is not None or segment < count - 1:
                    self._bad_token(segment, checksum, "missing")
            elif listed is None or set(listed[1]) != {f"tokens/{path.name}"}:
                self._bad_token(segment, checksum, "damaged")
            else:
                self.expected[path] = listed[1][f"tokens/{path.name}"], segment

    def _expect_segments(self, count: int, manifest: Manifest | None) -> None:
        for segment in range(count):
            checksum = segment_checksum(self.store, segment)
            if not checksum.exists():
                if manifest is not None and manifest.finished:
                    self._add(checksum, f"missing: segment {segment} has no activations")
                continue
            listed = sums_or_none(checksum)
            if listed is None:
                self._bad_segment(segment, checksum, "damaged")
            elif manifest is not None and not is_complete(listed[1], segment, manifest):
                self._bad_segment(segment, checksum, f"does not list rows, statistics and {_names(manifest)}")
            else:
                for relative, digest in listed[1].items():
                    path = self.store / relative
                    if path.exists():
                        self.expected[path] = digest, segment
                    else:
                        self._bad_segment(segment, path, "missing")

    def _hash(self) -> int:
        """Compare all files with their checksums; return how many bytes were read."""
        sizes = {path: path.stat().st_size for path in self.expected}
        with bar(f"verifying {self.store.name}", sum(sizes.values()), "bytes") as advance, \
                ThreadPoolExecutor(READERS) as pool:
            for (path, (expected, segment)), digest in zip(self.expected.items(), pool.map(sha256, self.expected),
                                                           strict=True):
                if digest != expected:
                    bad = self._bad_token if path.parent.name == "tokens" else self._bad_segment
                    bad(segment, path, how_damaged(path))
                advance(sizes[path])
        return sum(sizes.values())

    def _check_tokens(self, count: int, index: dict[str, Any] | None) -> dict[int, dict[str, np.ndarray]]:
        """The rows of each sound token segment that its `rows` file should have, in the order of the text."""
        rows = {}
        for segment in range(count):
            path = self.store / "tokens" / segment_name(segment)
            listed = sums_or_none(token_checksum(self.store, segment))
            if path not in self.expected or path in self.damaged or listed is None:
                continue
            arrays, _ = read_tensors(path, "np")
            found = len(arrays["token_ids"])
            if listed[0] != found:
                self._bad_token(segment, token_checksum(self.store, segment),
                                f"says {listed[0]} rows, the file has {found}")
            elif index is not None and index["rows"][segment] != found:
                self._bad_file(self.store / "tokens" / "index.json",
                               f"says {index['rows'][segment]} rows for segment {segment}, its tokens are {found}")
            rows[segment] = rows_of_tokens(arrays)
        return rows

    def _check_segment(self, segment: int, manifest: Manifest | None, wanted: dict[str, np.ndarray] | None) -> None:
        """Check that all files of a segment have its rows, and that these are the rows of its tokens."""
        checksum = segment_checksum(self.store, segment)
        listed = sums_or_none(checksum)
        if listed is None or wanted is None:
            return
        count = len(wanted["token_id"])
        if listed[0] != count:
            self._bad_segment(segment, checksum, f"says {listed[0]} rows, the segment's tokens are {count}")
        for relative in listed[1]:
            path = self.store / relative
            if path in self.damaged or path not in self.expected:
                continue
            if relative.startswith("rows/"):
                if not same_rows(read_tensors(path, "np")[0], wanted):
                    self._bad_segment(segment, path, "its rows are not those of the segment's tokens")
            elif relative.startswith(SITE_FOLDERS) and (mistake := shape_mistake(path, count, manifest)):
                self._bad_segment(segment, path, mistake)
            elif relative.startswith(SITE_FOLDERS) and not blocks_fit(checksum, relative, path):
                self._bad_segment(segment, checksum, f"its checksums of blocks are not those of {relative}")

    def _check_counts(self, manifest: Manifest, index: dict[str, Any]) -> None:
        path = self.store / "manifest.json"
        tokens = {name: source.tokens for name, source in manifest.sources.items()}
        if (manifest.segments, manifest.rows) != (len(index["rows"]), sum(index["rows"])):
            self._add(path, f"says {manifest.rows} rows in {manifest.segments} segments, the index says "
                            f"{sum(index['rows'])} in {len(index['rows'])}", mends=False)
        elif tokens != index["tokens"] or sum(tokens.values()) != manifest.rows:
            self._add(path, f"says {tokens} tokens per source, the index says {index['tokens']}", mends=False)

    def _check_statistics(self, manifest: Manifest) -> None:
        """Check that the store's statistics are what its segments' sums add up to."""
        paths = [self.store / "statistics.json", self.store / "statistics.safetensors"]
        figures, tensors = add_up(self.store, manifest)
        try:
            found = read_tensors(paths[1], "pt")[0]
        except UserError:
            found = {}
        equal = (in_terms_of_now(json_or_none(paths[0])) == figures,
                 found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in tensors))
        for path, sound in zip(paths, equal, strict=True):
            if not sound:
                self._add(path, "missing" if not path.exists() else "not what the segments' sums add up to")
        if not all(equal):  # collection makes both again if the first is missing
            self.bad_files += paths

    def _find_strangers(self, count: int, manifest: Manifest | None) -> None:
        """Report files that do not belong to the store, and what killed processes left."""
        for path in sorted(files_below(self.store)):
            relative = path.relative_to(self.store).as_posix()
            if match := TEMPORARY.fullmatch(relative):
                if not self.live:
                    self._bad_file(self.store / match[1], "left half-written by a killed process")
            elif match := SEGMENT_FILE.fullmatch(relative):
                folder, number = match[1] or "checksums", int(match[2] or match[3])
                if manifest is not None and folder not in folders_of(manifest):
                    self._add(path, f"not of this store, which has {_names(manifest)}", mends=False)
                elif number >= count and not self.live:  # a process that is packing may have added some since
                    self._add(path, f"not of this store, which has {count} segments", mends=False)
            elif not OWN.fullmatch(relative):
                self._add(path, "not a file of a store", mends=False)

    def _delete(self) -> list[Path]:
        """What to delete. Checksums come before the files that they cover, so that after an interruption nothing
        incomplete looks complete."""
        files = list(self.bad_files)
        if self.bad_tokens:  # packing resumes at the first missing token segment, so all later ones go too
            tokens = self.store / "tokens"
            files.append(tokens / "index.json")
            for number in (number for number in segment_numbers(tokens) if number >= min(self.bad_tokens)):
                files += [token_checksum(self.store, number), tokens / segment_name(number)]
            files.append(token_checksum(self.store, min(self.bad_tokens)))
        for segment in sorted(self.bad_segments):
            files.append(segment_checksum(self.store, segment))
            files += sorted(path for folder in SEGMENT_FOLDERS
                            for path in self.store.glob(f"{folder}/{segment_name(segment)}"))
        return [path for path in dict.fromkeys(files) if path.exists()]


def _names(manifest: Manifest) -> str:
    return ", ".join(map(str, manifest.sites))
