"""Labelled tables: texts of two classes, on which probes are trained.

A table is a CSV file (perhaps compressed, `.csv.zst`) with the columns `prompt` and `target`, the label. The tables of
the package sae-probes (arXiv 2502.16681) are read as files: its code is never imported, and its dependencies are not
needed. Tables with more or fewer than two labels are skipped.
"""

import csv
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import zstandard

from olmoscope.errors import UserError
from olmoscope.seeds import generator

PACKAGE, INSIDE = "sae-probes", "sae_probes/data/cleaned_data"
SUFFIXES = (".csv", ".csv.zst")
TRAIN, TEST, LEAST_TEST = 1024, 512, 100
"""Most texts of a table to train and to test on; a small table keeps at least LEAST_TEST for testing, as in
sae-probes."""
SHORT = 200
"""Mean text length, in characters, up to which a table is used when the user names no tables: long texts take hours on
a laptop."""
SETS = 12
"""Default number of tables."""


@dataclass(frozen=True)
class Table:
    """Texts of two classes."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[bool, ...]

    @cached_property
    def content(self) -> str:
        """Hash of the texts and labels."""
        parts = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            parts.update(f"{int(label)}{len(text)}:{text}".encode())
        return parts.hexdigest()[:16]

    @property
    def mean_length(self) -> float:
        """In characters."""
        return sum(map(len, self.texts)) / len(self.texts)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Training rows and test rows, both in random order and with equal numbers of both classes.

        There are at most TRAIN and TEST of them. If there are fewer than TRAIN + LEAST_TEST, LEAST_TEST are for
        testing.

        Raises:
            UserError: there are too few texts.
        """
        labels = np.array(self.labels)
        random = generator(0, "texts of a labelled table", int(self.content, 16) % 2**32)
        classes = [random.permutation(np.flatnonzero(labels == label)) for label in (False, True)]
        half = min(map(len, classes))
        train = min(half - LEAST_TEST // 2, TRAIN // 2)
        if train < LEAST_TEST // 2:
            raise UserError(f"table {self.name}: only {half} texts have its rarer label; a probe needs {LEAST_TEST} of "
                            "each")
        test = min(half - train, TEST // 2)
        return (random.permutation(np.concatenate([rows[:train] for rows in classes])),
                random.permutation(np.concatenate([rows[train : train + test] for rows in classes])))


@dataclass(frozen=True)
class Tables:
    """Some tables, and a readable name of their source."""

    source: str
    tables: list[Table]


def read_tables(folder: Path | None, wanted: str | None) -> Tables:
    """The tables to measure on.

    Args:
        folder: where they are; None: those of the installed package sae-probes.
        wanted: a number, `all`, or names separated by commas; None means SETS. A number selects tables of short texts,
            in an order that depends only on their names, so a larger number adds tables to the same first ones.

    Raises:
        UserError: no such package, folder or table.
    """
    if folder is not None:
        source = folder.name
    else:
        folder, source = _installed()
    files = {path.name.removesuffix(".zst").removesuffix(".csv"): path for path in sorted(folder.glob("*"))
             if path.name.endswith(SUFFIXES)} if folder.is_dir() else {}
    if not files:
        raise UserError(f"{folder} holds no labelled tables (*.csv or *.csv.zst, with the columns prompt and target)")
    if wanted is not None and wanted != "all" and not wanted.isdecimal():
        names = [name.strip() for name in wanted.split(",")]
        if unknown := [name for name in names if name not in files]:
            raise UserError(f"--probing-sets: {folder} holds no table {unknown[0]!r}; it holds, for example, "
                            f"{', '.join(list(files)[:3])}")
        tables = [_read(name, files[name]) for name in names]
        if several := [name for name, table in zip(names, tables, strict=True) if table is None]:
            raise UserError(f"--probing-sets: {several[0]} does not have exactly two labels; leave it out")
        return Tables(source, [table for table in tables if table])
    found = [table for name, path in files.items() if (table := _read(name, path))]
    found.sort(key=lambda table: hashlib.sha256(table.name.encode()).hexdigest())
    if wanted != "all":
        count = SETS if wanted is None else int(wanted)
        found = [table for table in found if table.mean_length <= SHORT][:count]
    if not found:
        raise UserError(f"--probing-sets {wanted or SETS}: {folder} holds no table of short texts with two labels; "
                        "name tables, or give all")
    return Tables(source, found)


def _installed() -> tuple[Path, str]:
    try:
        found = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise UserError("--probing reads the labelled tables of the package sae-probes, which is not installed here: "
                        "`pip install --no-deps sae-probes`, or name a folder of tables with --probing-data") from error
    return Path(str(found.locate_file(INSIDE))), f"{PACKAGE} {found.version}"


def _read(name: str, path: Path) -> Table | None:
    """A table; None if it does not have exactly two labels."""
    try:
        data = path.read_bytes()
        text = (zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error, zstandard.ZstdError) as error:
        raise UserError(f"{path} is not a labelled table ({error})") from error
    if not rows or not {"prompt", "target"} <= rows[0].keys():
        raise UserError(f"{path} is not a labelled table: it needs rows, and the columns prompt and target")
    labels = sorted({row["target"] for row in rows})
    if len(labels) != 2:
        return None
    return Table(name, tuple(row["prompt"] for row in rows), tuple(row["target"] == labels[1] for row in rows))
