"""Check what `olmoscope export INDEX --to neuronpedia --folder ROOT` wrote by Neuronpedia's own schema.

    python tests/foreign/read_neuronpedia.py SCHEMA.prisma ROOT

SCHEMA.prisma is `apps/webapp/prisma/schema.prisma` of hijohnnylin/neuronpedia. Columns and types are read from it, and
also compared with those that the tests go by.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from neuronpedia_schema import TABLES, read

_COLUMN = re.compile(r'^\s+(\w+)\s+(\w+)(\(".*"\))?(\?|\[\])?(.*)$')
_PLAIN = {"String", "Int", "Float", "Boolean", "DateTime", "Json", "Visibility", "Unsupported"}


def columns_of(schema, table):
    """The columns of a table that are no relations, as neuronpedia_schema.py writes them."""
    body = re.search(rf"^model {table} {{$(.*?)^}}$", schema, re.M | re.S)[1]
    found = {}
    for line in body.splitlines():
        column = _COLUMN.match(line)
        if column and column[2] in _PLAIN:
            kind = column[4] or ("" if "@default" in column[5] else "!")
            found[column[1]] = column[2] + kind
    return found


def main(schema, root):
    tables = {table: columns_of(Path(schema).read_text(), table) for table in TABLES}
    for table, columns in tables.items():
        differing = set(columns.items()) ^ set(TABLES[table].items())
        assert not differing, f"{table}: the tests have other columns: {sorted(differing)}"
    for model in sorted(Path(root, "v1").glob("*/*/model.jsonl")):
        rows = read(model.parent, tables)
        print(f"{model.parent.relative_to(root)}: by schema.prisma valid: "
              + ", ".join(f"{len(some):,} of {table}" for table, some in rows.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
