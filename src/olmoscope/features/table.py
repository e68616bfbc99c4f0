"""The list of features: features.parquet, a line for each feature, sorted, filtered and searched by DuckDB."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import duckdb
import numpy as np
import pyarrow as pa

from olmoscope.features.corpus import read_table
from olmoscope.features.records import Line, Page

Sort = Literal["telling", "score", "feature", "rows", "density", "max", "mean", "token", "promoted"]
"""`telling`: the largest activation times −log density, so strong features that are rare come first and dead
ones last. `score`: of the label, as given. `token`: the first preferred token."""

_ORDER = {"telling": "CASE WHEN rows > 0 THEN -max * ln(density) ELSE -1 END", "token": "tokens[1]",
          "promoted": "promoted[1]", "score": "(SELECT score FROM scores WHERE id = feature)"}


@dataclass(frozen=True)
class Filters:
    """Conditions on a line; None for no condition."""

    min_density: float | None = None
    max_density: float | None = None
    min_max: float | None = None
    max_max: float | None = None
    dead: bool | None = None
    token: str | None = None
    """A part of one of the preferred tokens, whatever its case."""
    promoted: str | None = None
    """A part of one of the promoted tokens, whatever its case."""
    source: str | None = None
    """The preferred source."""
    among: Sequence[int] | np.ndarray | None = None
    """Only these features."""
    besides: Sequence[int] | np.ndarray | None = None
    """Not these features."""


NO_SCORES: Mapping[int, float] = MappingProxyType({})


class Table:
    """The lines, in memory; any thread may ask."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: missing or damaged.
        """
        self._database = duckdb.connect(":memory:", config={"threads": 2})
        self._lock = threading.Lock()
        lines = read_table(path)
        self._database.register("file", lines)
        self._database.execute(
            "CREATE TABLE lines AS SELECT *, lower(concat(array_to_string(tokens, chr(10)), chr(10), "
            "array_to_string(promoted, chr(10)))) AS searched FROM file ORDER BY feature")
        self._database.unregister("file")

    def page(self, sort: Sort = "telling", descending: bool = True, filters: Filters = Filters(),
             search: str = "", also: Sequence[int] | np.ndarray = (), offset: int = 0, limit: int = 50,
             scores: Mapping[int, float] = NO_SCORES) -> Page:
        """Some lines of the list.

        Args:
            search: a part of a preferred or promoted token, whatever its case.
            also: features that count as found, whatever their tokens (their labels may match).
            offset: lines to skip.
            scores: of labels, by feature, to sort by.
        """
        where, values, tables = _conditions(filters, search, also)
        if sort == "score":
            tables["scores"] = pa.table({"id": pa.array(list(scores), pa.int32()),
                                         "score": pa.array(list(scores.values()), pa.float64())})
        with self._cursor(tables) as cursor:
            total = cursor.execute(f"SELECT count(*) FROM lines WHERE {where}", values).fetchone()[0]
            rows = cursor.execute(
                "SELECT feature, rows, density, max, mean, tokens, promoted, suppressed, source FROM lines "
                f"WHERE {where} ORDER BY {_order(sort, descending)} LIMIT {int(limit)} OFFSET {int(offset)}",
                values).fetchall()
        return Page([Line(*row) for row in rows], total)

    def order(self, sort: Sort = "telling", descending: bool = True, filters: Filters = Filters(),
              search: str = "", also: Sequence[int] | np.ndarray = (),
              scores: Mapping[int, float] = NO_SCORES) -> np.ndarray:
        """The features of the whole list in its order, int64; arguments as in `page`."""
        where, values, tables = _conditions(filters, search, also)
        if sort == "score":
            tables["scores"] = pa.table({"id": pa.array(list(scores), pa.int32()),
                                         "score": pa.array(list(scores.values()), pa.float64())})
        with self._cursor(tables) as cursor:
            found = cursor.execute(f"SELECT feature FROM lines WHERE {where} ORDER BY {_order(sort, descending)}",
                                   values)
            order: np.ndarray = found.fetchnumpy()["feature"].astype(np.int64)
            return order

    def _cursor(self, tables: dict[str, pa.Table]) -> Any:
        with self._lock:
            cursor = self._database.cursor()
        for name, table in tables.items():
            cursor.register(name, table)
        return cursor


def _order(sort: Sort, descending: bool) -> str:
    assert sort in get_args(Sort), sort
    return f"{_ORDER.get(sort, sort)} {'DESC' if descending else 'ASC'} NULLS LAST, feature"


def _conditions(filters: Filters, search: str, also: Sequence[int] | np.ndarray
                ) -> tuple[str, list[Any], dict[str, pa.Table]]:
    """The condition after WHERE, the values for its question marks, and the tables of ids that it names."""
    conditions: list[tuple[str, list[Any]]] = [("TRUE", [])]
    for name, column, sign in (("min_density", "density", ">="), ("max_density", "density", "<="),
                               ("min_max", "max", ">="), ("max_max", "max", "<="), ("source", "source", "=")):
        if (bound := getattr(filters, name)) is not None:
            conditions.append((f"{column} {sign} ?", [bound]))
    if filters.dead is not None:
        conditions.append(("rows = 0" if filters.dead else "rows > 0", []))
    for name, column in (("token", "tokens"), ("promoted", "promoted")):
        if (wanted := getattr(filters, name)) is not None:
            conditions.append((f"contains(lower(array_to_string({column}, chr(10))), lower(?))", [wanted]))
    tables = {}
    for name, features, condition in (("among", filters.among, "feature IN (SELECT id FROM among)"),
                                      ("besides", filters.besides, "feature NOT IN (SELECT id FROM besides)")):
        if features is not None:
            tables[name] = _ids(features)
            conditions.append((condition, []))
    if search:
        found = "contains(searched, lower(?))"
        if len(also):
            tables["also"] = _ids(also)
            found = f"({found} OR feature IN (SELECT id FROM also))"
        conditions.append((found, [search]))
    return (" AND ".join(condition for condition, _ in conditions), [value for _, some in conditions for value in some],
            tables)


def _ids(features: Sequence[int] | np.ndarray) -> pa.Table:
    return pa.table({"id": pa.array(np.asarray(features, dtype=np.int32))})
